"""What a query or document may be: text or images, checked, cleaned and read, before a back end gets it."""

NEUTRAL = "a"
"""A text that no model or server refuses: what becomes of it is due to what stands around it."""
