"""The study: what each method is worth on models small enough for two cores."""
