"""The parts that model families are built of; each works on one device and knows no ranks."""
