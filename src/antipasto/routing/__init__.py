"""What pairs say of an exploit, direction and monitor, and what becomes of it: gates, and the router that splits steps."""
