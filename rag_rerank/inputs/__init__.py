"""What a query or document may be: text or images, checked, cleaned and read, before a back end gets it."""
