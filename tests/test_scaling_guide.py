"""The Kubernetes sketch of docs/pages/scaling.md holds together: names, ports, probes and the key's way."""

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from rag_rerank import VLLMScorer

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "pages" / "scaling.md"


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, Any]]:
    """By kind."""
    [block] = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    return {resource["kind"]: resource for resource in yaml.safe_load_all(block)}


def pod(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"]["template"]["spec"]


def environment(resource: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each for each in pod(resource)["containers"][0]["env"]}


def test_selectors_select_the_pods(resources):
    """Those of the workloads and of the service."""
    labels = {kind: resources[kind]["spec"]["template"]["metadata"]["labels"] for kind in ("StatefulSet", "Deployment")}
    for kind, own in labels.items():
        assert resources[kind]["spec"]["selector"]["matchLabels"] == own
    assert resources["Service"]["spec"]["selector"] == labels["StatefulSet"]


def test_probes_ask_for_health_at_the_port_that_is_served(resources):
    """All three, by the port's name."""
    [container] = pod(resources["StatefulSet"])["containers"]
    [port] = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert resources["Service"]["spec"]["ports"] == [{"name": port["name"], "port": port["containerPort"]}]


def test_the_client_has_the_address_of_every_server(resources):
    """POD.SERVICE, which a service without a cluster address gives each pod of a StatefulSet."""
    servers, service = resources["StatefulSet"], resources["Service"]
    assert servers["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    port = service["spec"]["ports"][0]["port"]
    name = servers["metadata"]["name"]
    urls = [
        f"http://{name}-{number}.{service['metadata']['name']}:{port}" for number in range(servers["spec"]["replicas"])
    ]
    value = environment(resources["Deployment"])["VLLM_BASE_URL"]["value"]
    assert value.split(",") == urls
    with mock.patch.dict(os.environ, {"VLLM_BASE_URL": value, "VLLM_API_KEY": "key"}):
        assert all(url in repr(VLLMScorer(send_key_over_http=True)) for url in urls)


def test_both_sides_have_the_same_key_from_a_secret(resources):
    """And it stands nowhere."""
    server, client = (environment(resources[kind])["VLLM_API_KEY"] for kind in ("StatefulSet", "Deployment"))
    assert server == client
    assert "value" not in server
    assert server["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}
