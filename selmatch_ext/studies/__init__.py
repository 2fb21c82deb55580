"""What a small training set is good for, asked in several ways."""
