"""Text in: which files the words of --input stand for, their compression, and the documents that they hold."""
