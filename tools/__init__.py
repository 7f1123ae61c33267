"""What is used beside a run, not in it: plan, checks, figures of an evaluation, proposer of rubrics. May stay closed."""
