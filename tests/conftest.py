"""What holds for every test."""

from hypothesis import settings

settings.register_profile("megalm", deadline=None)  # no test asserts a time
settings.load_profile("megalm")
