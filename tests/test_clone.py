"""What a clone of the repository, with no data beside it, leaves out."""


def test_few_tests_need_data_from_beside_the_repository(request):
    """Of those collected: the whole suite where the whole suite runs. Each of them is skipped where `shared` is absent."""
    needing = [item.nodeid for item in request.session.items if "shared_data" in getattr(item, "fixturenames", ())]
    assert len(needing) < 40, "\n".join(needing)
