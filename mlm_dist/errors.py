"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A mistake in what the user gave: names the field, its value and what would be right. Programs print it in one piece and exit 2."""
