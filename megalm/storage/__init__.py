"""Files that processes share: written so that they are whole, built so that they are built once."""
