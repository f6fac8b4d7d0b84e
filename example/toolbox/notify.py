"""Tell people which tools failed, in a chat, by mail or by PagerDuty. It fails nothing itself.

Where to is in the environment, so that no secret is in a table: NOTIFY_WEBHOOK, of Slack,
Mattermost and the like; NOTIFY_MAIL_TO, NOTIFY_MAIL_FROM, NOTIFY_SMTP (host:port), NOTIFY_SMTP_USER
and NOTIFY_SMTP_PASSWORD; NOTIFY_PAGERDUTY, a routing key. NOTIFY_NAME is said first in all.
"""
import html
import json
import smtplib
import ssl
from email.message import EmailMessage
from os import environ
from urllib.request import HTTPRedirectHandler, Request, build_opener

PAGERDUTY = "https://events.pagerduty.com/v2/enqueue"


def run(context, on="failure", timeout_s=10):
    """Tell how the tools before this one ended, if any failed; with on="always", in any case."""
    ended, name = context.outcomes, environ.get("NOTIFY_NAME", "pipeline")
    failed = [f"{tool} {each.status}: {each.error or each.reason}" for tool, each in ended.items()
              if each.status in ("failed", "partial", "interrupted")]
    lines = [f"{name}: {len(failed)} of {len(ended)} tools failed (run {context.run_id})", *failed]
    text = "\n".join(" ".join(line.split()) for line in lines[:20])  # each is one, whatever it has
    page = {"routing_key": environ.get("NOTIFY_PAGERDUTY"), "dedup_key": name,
            "event_action": "trigger" if failed else "resolve",
            "payload": {"summary": text[:1024], "source": name, "severity": "error"}}
    for variable, send, what in [("NOTIFY_WEBHOOK", post, {"text": html.escape(text, False)}),
                                 ("NOTIFY_MAIL_TO", mail, text), ("NOTIFY_PAGERDUTY", post, page)]:
        if environ.get(variable) and (failed or on == "always"):
            try:
                send(PAGERDUTY if what is page else environ[variable], what, timeout_s)
            except Exception as error:  # of these, the text may hold an address, which is secret
                why = error if isinstance(error, OSError) else type(error).__name__
                context.log.warning("nobody is told by %s: %s", variable, why)


class Stay(HTTPRedirectHandler):
    redirect_request = lambda *_: None  # what is sent is for nobody else


def post(url, content, timeout_s):
    request = Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    build_opener(Stay).open(request, timeout=timeout_s).close()


def mail(to, text, timeout_s):
    host, _, port = environ.get("NOTIFY_SMTP", "localhost").partition(":")
    message = EmailMessage()  # which takes no line break in a header
    sender, subject = environ.get("NOTIFY_MAIL_FROM", to), text.partition("\n")[0]
    message["From"], message["To"], message["Subject"] = sender, to, subject
    message.set_content(text)
    with smtplib.SMTP(host, int(port or 25), timeout=timeout_s) as smtp:
        if host not in ("localhost", "127.0.0.1"):
            smtp.starttls(context=ssl.create_default_context())
        if environ.get("NOTIFY_SMTP_USER"):
            smtp.login(environ["NOTIFY_SMTP_USER"], environ["NOTIFY_SMTP_PASSWORD"])
        smtp.send_message(message)
