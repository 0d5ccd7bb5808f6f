Feature: Orders of marketplaces
  The worker computes what an order comes to; that is all it waits for.

  Background:
    Given orders of the lifecycle "marketplace"

  Scenario: An order is done once the worker has seen it
    When user "seller" orders
      """
      {"payload": {"id": 7, "items": [{"product_id": "book", "quantity": 2, "price": "19.99"}]}}
      """
    Then the answer is 201
    And the order is "done"
    And the order comes to 39.98

  Scenario: An order that cannot be computed is rejected, and may be mended
    When user "seller" orders
      """
      {"payload": {"items": "many"}}
      """
    Then the answer is 422
    And the order is "rejected"
    When the client changes the amount to 12.50
    Then the answer is 200
    And the order is "done"
    And the order comes to 12.50

  Scenario: People put an order in processing and back
    Given user "seller" has ordered for 10
    When somebody sets the status to "processing"
    Then the answer is 200
    And the order is "processing"
    When somebody sets the status to "done"
    Then the order is "done"

  Scenario: A cancelled order takes no change
    Given user "seller" has ordered for 10
    When somebody cancels the order
    Then the order is "cancelled"
    When the client changes the amount to 20
    Then the answer is 409
    When somebody sets the status to "done"
    Then the answer is 409
    And it allows ""
