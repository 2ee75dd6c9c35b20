"""The planner's questions and answers: one typed request and one typed response for each endpoint of /api/v1/plan."""
