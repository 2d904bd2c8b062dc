"""What a checkpoint's files declare, and how they are read."""
