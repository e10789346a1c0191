"""The genuine clients' server: one cluster and one bridge for all tests, with a key for each role."""
import sys

import openai
import pytest
from harness import FIXTURES, PATIENCE, ROOT, Bridge, Cluster

sys.path.insert(0, str(ROOT / "test/hub"))
import hub as hub_module  # noqa: E402

KEYS = {  # name of the key: (role, limits)
    "user": ("app", ""),
    "admin": ("boss", ""),
    "stranger": ("nobody", ""),          # a role that may do nothing of millm's
    "revoked": ("app", ""),
    "single": ("app", ", max_concurrency => 1"),
    "short": ("app", ", max_tokens => 5"),
    "hasty": ("app", ", timeout => '300 ms'"),
}


def make_roles(cluster):
    """The roles, and the text of each key by its name."""
    for sql in ("CREATE ROLE app", "CREATE ROLE boss", "CREATE ROLE nobody", "CREATE ROLE bridge LOGIN NOINHERIT",
                "GRANT pg_read_server_files TO boss", "SELECT millm.grant_user('app'), millm.grant_admin('boss'), millm.grant_bridge('bridge')"):
        cluster.execute(sql)
    keys = {name: cluster.value(f"SELECT millm.create_api_key(%s, %s::regrole{limits})", name, role) for name, (role, limits) in KEYS.items()}
    cluster.execute("SELECT millm.revoke_api_key('revoked')")
    return keys


@pytest.fixture(scope="session")
def cluster():
    # deterministic: a reply must not depend on who else is served at the time
    hub = hub_module.start(FIXTURES / "hub")
    cluster = Cluster("cluster", **{"millm.deterministic": "on", "millm.max_sequences": 32, "millm.max_queue": 256, "millm.hf_endpoint": hub.endpoint})
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def keys(cluster):
    return make_roles(cluster)


@pytest.fixture(scope="session")
def bridge(cluster, keys):
    bridge = Bridge(cluster)
    yield bridge
    assert bridge.stop() == 0


@pytest.fixture
def tiny(cluster):
    """A model of a few hundred kilobytes, loaded; it knows conversations, and no answer ends by itself."""
    return cluster.load("tiny-chat")


@pytest.fixture
def smollm2(cluster):
    return cluster.load("SmolLM2-135M-Instruct")


@pytest.fixture
def client(bridge, keys):
    """As a user makes one, but that it does not try again: the test is to see the first answer."""
    with openai.OpenAI(base_url=f"{bridge.url}/v1", api_key=keys["user"], max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def client_of(bridge, keys):
    """client_of(name of a key, or a key)"""
    return lambda key: openai.OpenAI(base_url=f"{bridge.url}/v1", api_key=keys.get(key, key), max_retries=0, timeout=PATIENCE)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what the servers logged while it ran."""
    report = (yield).get_result()
    if report.when == "call" and report.failed:
        for name in ("bridge", "cluster"):
            server = item.funcargs.get(name)
            if server:
                report.sections.append((f"end of {server.log}", "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])))
