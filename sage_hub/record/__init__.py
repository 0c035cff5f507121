"""What is written and shown of a release: manifest, report, gates, tables, card and pictures."""
