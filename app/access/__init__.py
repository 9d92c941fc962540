"""Who may use the service: by which name it is called, from which web pages, with which key."""
