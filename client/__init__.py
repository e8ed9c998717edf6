"""One hospital: its images, features, training and evaluation, behind one function."""
