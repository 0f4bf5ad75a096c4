from __future__ import annotations

from django.http import HttpRequest, JsonResponse

from example_project.models import Product


def prices(request: HttpRequest) -> JsonResponse:
    """Answer with what each product costs."""
    return JsonResponse(dict(Product.objects.values_list("sku", "price")))


async def prices_async(request: HttpRequest) -> JsonResponse:
    """Answer with the same, from the event loop."""
    rows = Product.objects.values_list("sku", "price")
    return JsonResponse({sku: price async for sku, price in rows})
