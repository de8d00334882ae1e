"""From the one-device model to the part of it that a rank holds, and the way ranks work on it together."""
