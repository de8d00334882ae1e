"""What happens to a text before it is encoded, and to documents before they are written, one file a filter."""
