"""What an evaluation is made of: models, pictures, records, features of pictures, real pictures, process evidence."""
