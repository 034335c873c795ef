"""One file per named method: equations, citation, composition. The folders are the survey's own headings."""
