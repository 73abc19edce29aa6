"""Keystone and Barbican on loopback, for tests. All that they write is in one folder.

openstack.py prepare FOLDER                           makes both databases, with users, a project and a catalogue
openstack.py keystone FOLDER PORT BARBICAN'S_URL      runs Keystone
openstack.py barbican FOLDER PORT KEYSTONE'S_PORT     runs Barbican
"""

import base64
import json
import os
import pathlib
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request

SERVICES = ("identity", "key-manager")
# The password and the secret of the application credential of each is the name.
USERS = ("host1", "host2", "owner")
PROJECT = "volumes"


def prepare(folder):
    folder.mkdir(parents=True)
    keystone_settings(folder)
    program = [sys.executable, pathlib.Path(sys.prefix) / "bin/keystone-manage", "--config-file", folder / "keystone.conf"]
    for keys in ("fernet", "credential"):
        (folder / keys).mkdir(mode=0o700)
    who = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    bootstrap = ["bootstrap", "--bootstrap-password", "admin", "--bootstrap-region-id", "here"]
    for interface in ("public", "internal"):
        bootstrap += [f"--bootstrap-{interface}-url", "http://127.0.0.1:1/v3"]
    for command in (["db_sync"], ["fernet_setup", *who], bootstrap):
        subprocess.run([*program, *command], check=True)
    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, "keystone", folder, str(port), "http://127.0.0.1:1"])
    try:
        populate(f"http://127.0.0.1:{port}/v3")
    finally:
        server.terminate()
        server.wait()


def populate(keystone):
    admin = token(keystone, "admin", "admin")
    service = call("POST", f"{keystone}/services", admin, {"service": {"type": "key-manager", "name": "barbican"}})
    for interface in ("public", "internal"):
        endpoint = {"service_id": service["service"]["id"], "interface": interface, "region_id": "here", "url": "x"}
        call("POST", f"{keystone}/endpoints", admin, {"endpoint": {**endpoint, "url": "http://127.0.0.1:1"}})
    project = {"name": PROJECT, "domain_id": "default"}
    project = call("POST", f"{keystone}/projects", admin, {"project": project})["project"]["id"]
    roles = {role["name"]: role["id"] for role in call("GET", f"{keystone}/roles", admin)["roles"]}
    for name in USERS:
        user = {"name": name, "password": name, "domain_id": "default"}
        user = call("POST", f"{keystone}/users", admin, {"user": user})["user"]["id"]
        call("PUT", f"{keystone}/projects/{project}/users/{user}/roles/{roles['member']}", admin)
        credential = {"application_credential": {"name": "hypervisor", "secret": name}}
        call("POST", f"{keystone}/users/{user}/application_credentials", token(keystone, name, PROJECT), credential)


def token(keystone, user, project):
    """Each user's password is its name."""
    domain = {"domain": {"id": "default"}}
    identity = {"methods": ["password"], "password": {"user": {"name": user, "password": user, **domain}}}
    request = {"auth": {"identity": identity, "scope": {"project": {"name": project, **domain}}}}
    deadline = time.monotonic() + 120
    while True:
        try:
            return send("POST", f"{keystone}/auth/tokens", None, request).headers["X-Subject-Token"]
        except urllib.error.URLError as error:
            # It is not up yet.
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def send(method, url, credential, body=None):
    headers = {"Content-Type": "application/json", **({"X-Auth-Token": credential} if credential else {})}
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))


def call(method, url, credential, body=None):
    answer = send(method, url, credential, body).read()
    return json.loads(answer) if answer else None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def keystone_settings(folder):
    (folder / "keystone.conf").write_text(f"""
[DEFAULT]
log_file = {folder}/keystone.log
[database]
connection = sqlite:///{folder}/keystone.db
[identity]
password_hash_rounds = 4
[fernet_tokens]
key_repository = {folder}/fernet
[credential]
key_repository = {folder}/credential
""")


def barbican_settings(folder, keystone_port):
    # It looks for them in the home directory.
    settings = folder / ".barbican"
    settings.mkdir(exist_ok=True)
    kek = base64.urlsafe_b64encode(b"a key for tests only, 32 bytes..").decode()
    (settings / "barbican.conf").write_text(f"""
[DEFAULT]
log_file = {folder}/barbican.log
db_auto_create = True
[database]
connection = sqlite:///{folder}/barbican.db
[secretstore]
enabled_secretstore_plugins = store_crypto
[crypto]
enabled_crypto_plugins = simple_crypto
[simple_crypto_plugin]
kek = {kek}
[keystone_authtoken]
auth_type = password
auth_url = http://127.0.0.1:{keystone_port}/v3
www_authenticate_uri = http://127.0.0.1:{keystone_port}/v3
username = admin
password = admin
project_name = admin
user_domain_name = Default
project_domain_name = Default
""")


def keystone(folder, port, barbican_url):
    keystone_settings(folder)
    # The catalogue says where the two really are.
    with sqlite3.connect(folder / "keystone.db") as database:
        for service, url in zip(SERVICES, (f"http://127.0.0.1:{port}/v3", barbican_url)):
            of_service = "service_id = (SELECT id FROM service WHERE type = ?)"
            database.execute(f"UPDATE endpoint SET url = ? WHERE {of_service}", (url, service))
    os.environ["OS_KEYSTONE_CONFIG_FILES"] = str(folder / "keystone.conf")
    sys.argv = ["keystone"]
    from keystone.wsgi.api import application

    serve(application, int(port))


def barbican(folder, port, keystone_port):
    barbican_settings(folder, keystone_port)
    os.environ["HOME"] = str(folder)
    sys.argv = ["barbican"]
    from paste import deploy

    pipeline = pathlib.Path(sys.prefix) / "etc/barbican/barbican-api-paste.ini"
    serve(deploy.loadapp(f"config:{pipeline}"), int(port))


def serve(application, port):
    import waitress

    # SQLite refuses what is written by two transactions that both have read before.
    waitress.serve(application, host="127.0.0.1", port=port, threads=1)


if __name__ == "__main__":
    command, folder, *others = sys.argv[1:]
    commands = {"prepare": prepare, "keystone": keystone, "barbican": barbican}
    commands[command](pathlib.Path(folder).resolve(), *others)
