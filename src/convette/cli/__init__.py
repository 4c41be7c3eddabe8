"""The command line: one small file a verb; what they do lives in the rooms below."""
