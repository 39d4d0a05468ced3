"""sources: where models may come from, and what the daemon may show there."""

import click

from modelhost.cli.output import to_dict
from modelhost.cli.session import Command, Session, pass_session


@click.command(cls=Command)
@pass_session
def sources(session: Session) -> None:
    """Show where models may come from, and for whom there are credentials.

    What a credential is, is never shown: only who sees it, where it is kept, and whether it was
    accepted when it was last used.
    """
    from modelhost.cli import views

    output = session.output
    with session.client() as client:
        host = client.host()
    if output.json:
        found = [to_dict(source) for source in host.sources]
        output.document({"sources": found, "credentials": [to_dict(c) for c in host.credentials]})
        return
    output.rows(host.sources, views.SOURCE_COLUMNS)
    if host.credentials:
        output.blank()
        output.rows(host.credentials, views.CREDENTIAL_COLUMNS)
