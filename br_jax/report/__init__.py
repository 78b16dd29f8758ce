"""What is made of finished cells and files: results, gates, tables, figures, reports, descriptions."""
