"""The gauge that routers read."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from smoa_serve.server.lora_metric import OneSeries

DIGEST = "0123456789abcdef" * 2
LABELS = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")


def show(series: OneSeries, waiting: str, running: str, registry: CollectorRegistry) -> list[str]:
    # As in vLLM: another order than that of the labels' names.
    series.labels(running_lora_adapters=running, waiting_lora_adapters=waiting, max_lora=4).set_to_current_time()
    lines = generate_latest(registry).decode().splitlines()
    return [line.rpartition(" ")[0] for line in lines if line.startswith("vllm:")]


def test_only_the_last_combination_of_names_stays_and_users_names_are_shown() -> None:
    registry = CollectorRegistry()
    series = OneSeries(Gauge("vllm:lora_requests_info", "as vLLM makes it", LABELS, registry=registry))

    def line(waiting: str, running: str) -> list[str]:
        labels = f'max_lora="4",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        return [f"vllm:lora_requests_info{{{labels}}}"]

    assert show(series, "", f"legal@{DIGEST}", registry) == line("", "legal")
    assert show(series, "", f"legal@{DIGEST}", registry) == line("", "legal")
    assert show(series, f"legal@{DIGEST}", f"a/b@{DIGEST},other", registry) == line("legal", "a/b,other")
    two = f"legal@{DIGEST},legal@{DIGEST[::-1]}"
    assert show(series, "", two, registry) == line("", "legal"), "two revisions are one adapter"
    assert show(series, "", "", registry) == line("", "")
