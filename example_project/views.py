from __future__ import annotations

from django.http import HttpRequest, JsonResponse

from example_project.models import Product


def prices(request: HttpRequest) -> JsonResponse:
    """Answer with what each product costs."""
    return JsonResponse(dict(Product.objects.values_list("sku", "price")))
