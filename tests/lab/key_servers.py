"""What tests/lab/key-servers needs beside the servers themselves.

key_servers.py front PORT BEHIND FOLDER                     TLS in front of a server on loopback
key_servers.py hang PORT FOLDER                             takes connections and never answers
key_servers.py revoke-kmip PORT FOLDER VOLUME               revokes the volume's key
key_servers.py destroy-kmip PORT FOLDER VOLUME              destroys it, revoking it first if it is in use
key_servers.py destroy-barbican KEYSTONE BARBICAN VOLUME    deletes it, at the servers with these ports
key_servers.py order-barbican KEYSTONE BARBICAN BITS        has a key made as Cinder does (castellan), prints its UUID
key_servers.py digits-barbican KEYSTONE BARBICAN UUID       prints that key in hexadecimal digits, as os-brick has them
key_servers.py delete-barbican KEYSTONE BARBICAN UUID       deletes it
"""

import asyncio
import json
import pathlib
import ssl
import sys
import time
import urllib.parse
import urllib.request


def front(port, behind, folder):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(f"{folder}/server.pem", f"{folder}/server.key")

    async def copy(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            # Whoever left without a word has left.
            pass
        finally:
            writer.close()

    async def serve(reader, writer):
        try:
            reader_behind, writer_behind = await asyncio.open_connection("127.0.0.1", behind)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, writer_behind), copy(reader_behind, writer))

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
        await server.serve_forever()

    asyncio.run(run())


def hang(port, _folder):
    async def run():
        server = await asyncio.start_server(lambda _reader, _writer: asyncio.sleep(3600), "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(run())


def revoke_kmip(port, folder, volume):
    from kmip.core.enums import RevocationReasonCode

    with kmip_client(port, folder) as client:
        for key in kmip_keys(client, volume):
            client.revoke(RevocationReasonCode.KEY_COMPROMISE, key, "a case of the lab")


def destroy_kmip(port, folder, volume):
    from kmip.core.enums import RevocationReasonCode
    from kmip.pie.exceptions import KmipOperationFailure

    with kmip_client(port, folder) as client:
        for key in kmip_keys(client, volume):
            try:
                client.destroy(key)
            except KmipOperationFailure:
                client.revoke(RevocationReasonCode.CESSATION_OF_OPERATION, key, "a case of the lab")
                client.destroy(key)


def kmip_client(port, folder):
    from kmip.pie.client import ProxyKmipClient

    files = {"cert": f"{folder}/client.pem", "key": f"{folder}/client.key", "ca": f"{folder}/ca.pem"}
    return ProxyKmipClient(hostname="localhost", port=port, ssl_version="PROTOCOL_TLSv1_2", **files)


def kmip_keys(client, volume):
    from kmip.core.enums import AttributeType, NameType
    from kmip.core.factories.attributes import AttributeFactory

    name = {"name_value": f"volcrypt/{volume}", "name_type": NameType.UNINTERPRETED_TEXT_STRING}
    from kmip.core.attributes import Name

    keys = client.locate(attributes=[AttributeFactory().create_attribute(AttributeType.NAME, Name.create(**name))])
    assert keys, f"the server has no key of {volume}"
    return keys


def as_owner(keystone, barbican):
    """What asks Barbican as the user `owner`, and where Barbican is."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "key_managers"))
    import openstack

    token = openstack.token(f"http://127.0.0.1:{keystone}/v3", "owner", openstack.PROJECT)
    return openstack, token, f"http://127.0.0.1:{barbican}/v1"


def order_barbican(keystone, barbican, bits):
    openstack, token, url = as_owner(keystone, barbican)
    meta = {"algorithm": "aes", "bit_length": bits, "payload_content_type": "application/octet-stream"}
    order = openstack.call("POST", f"{url}/orders", token, {"type": "key", "meta": meta})["order_ref"]
    order = f"{url}/orders/{order.rsplit('/', 1)[1]}"
    for _ in range(100):
        made = openstack.call("GET", order, token)
        assert made["status"] != "ERROR", made
        if made["status"] == "ACTIVE":
            print(made["secret_ref"].rsplit("/", 1)[1])
            return
        time.sleep(0.1)
    raise SystemExit(f"the order stays {made['status']}")


def digits_barbican(keystone, barbican, secret):
    _, token, url = as_owner(keystone, barbican)
    headers = {"X-Auth-Token": token, "Accept": "application/octet-stream"}
    request = urllib.request.Request(f"{url}/secrets/{secret}/payload", None, headers)
    print(urllib.request.urlopen(request).read().hex())


def delete_barbican(keystone, barbican, secret):
    openstack, token, url = as_owner(keystone, barbican)
    openstack.send("DELETE", f"{url}/secrets/{secret}", token)


def destroy_barbican(keystone, barbican, volume):
    openstack, token, url = as_owner(keystone, barbican)
    url += "/secrets"
    query = urllib.parse.urlencode({"name": f"volcrypt/{volume}"})
    secrets = json.loads(openstack.send("GET", f"{url}?{query}", token).read())["secrets"]
    assert secrets, f"the server has no key of {volume}"
    for secret in secrets:
        openstack.send("DELETE", f"{url}/{secret['secret_ref'].rsplit('/', 1)[1]}", token)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands = {
        "front": front,
        "hang": hang,
        "revoke-kmip": revoke_kmip,
        "destroy-kmip": destroy_kmip,
        "destroy-barbican": destroy_barbican,
        "order-barbican": order_barbican,
        "digits-barbican": digits_barbican,
        "delete-barbican": delete_barbican,
    }
    commands[command](*(int(argument) if argument.isdigit() else argument for argument in arguments))
