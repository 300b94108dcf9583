"""What the HTML report is made of: its data, its picture, its template, style and script."""
