"""Methods of published systems: a small file each, which binds what a layer or loss can do to the trainer's events."""
