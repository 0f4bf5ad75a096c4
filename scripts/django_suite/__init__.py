"""Django's own tests, run with the guard off and on; scripts/django-suite is what to call."""
