"""Questions and answers, as records and as token ids."""
