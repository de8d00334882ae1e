"""`megalm <command>` for trained models, one thin file each."""
