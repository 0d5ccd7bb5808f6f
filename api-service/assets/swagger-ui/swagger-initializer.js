// Ours: Swagger UI brings the same file with a document of somebody else's.
window.onload = function () {
  window.ui = SwaggerUIBundle({
    // Beside these pages, whatever path a gateway has put before both.
    url: "../openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayRequestDuration: true,
    tryItOutEnabled: true,
    // Otherwise it sends the document's address to a validator on the Internet.
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
    plugins: [SwaggerUIBundle.plugins.DownloadUrl],
    layout: "StandaloneLayout",
  });
};
