"""The subcommands of ``manage.py dbhealth``, one module each."""
