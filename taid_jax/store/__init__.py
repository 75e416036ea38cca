"""A teacher's outputs on disk: written once, and read in place of the teacher."""
