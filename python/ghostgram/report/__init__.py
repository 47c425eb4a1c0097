"""What a run found: its numbers (`summary`, `roc`), its figures (`plots`), and all of it on one page (`html`)."""
