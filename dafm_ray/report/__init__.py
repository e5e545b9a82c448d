"""What a person or a script reads of an evaluation: tables, pictures, files."""
