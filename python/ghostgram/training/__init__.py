"""What any method needs of a training job: its step in closed form, its processes, passes that leave no trace."""
