"""The job: tasks, the loop and its command line."""
