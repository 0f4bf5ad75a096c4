from __future__ import annotations

from django.urls import include, path

from example_project import views

handler500 = "django_dbhealth.views.server_error"

urlpatterns = [
    path("", views.prices),
    path("async/", views.prices_async),
    path("health/", include("django_dbhealth.urls")),
]
