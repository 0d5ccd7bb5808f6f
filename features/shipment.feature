Feature: Orders on their way to a pick-up store
  Messages of others, people, or the clock move an order, and every move is told.

  Background:
    Given orders of the lifecycle "shipment"

  Scenario: The whole way
    Given user "alice" has ordered
    When "order.state.update" brings
      """
      {"eventType": "PaymentCompleted", "orderId": "<order>", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then the order becomes "WaitingForShipment"
    And "order.state.changed" is told
      """
      {"eventType": "OrderStatusChanged", "orderId": "<order>", "fromStatus": 0, "toStatus": 2}
      """
    When "order.state.update" brings
      """
      {"eventType": "ShipmentStarted", "orderId": "<order>", "timestamp": "2026-01-01T11:00:00Z"}
      """
    Then the order becomes "InTransit"
    When "order.state.update" brings
      """
      {"eventType": "PackageArrivedAtPickupStore", "orderId": "<order>", "timestamp": "2026-01-01T12:00:00Z"}
      """
    Then the order becomes "WaitPickup"
    When "order.state.update" brings
      """
      {"eventType": "PackagePickedUp", "orderId": "<order>", "timestamp": "2026-01-01T13:00:00Z"}
      """
    Then the order becomes "Completed"
    And "order.state.changed" is told
      """
      {"eventType": "OrderStatusChanged", "orderId": "<order>", "fromStatus": 3, "toStatus": 4}
      """
    And "order.state.changed" is told of the order 4 times

  Scenario: A payment for an order that nobody has told us of
    When "order.state.update" brings
      """
      {"eventType": "PaymentCompleted", "orderId": "A-2026-17", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then the order with the external id "A-2026-17" of user "unknown" becomes "WaitingForShipment"
    And "order.state.changed" is told
      """
      {"eventType": "OrderStatusChanged", "orderId": "A-2026-17", "fromStatus": 0, "toStatus": 2}
      """

  Scenario: A shipment that starts before its payment waits for that
    Given user "alice" has ordered
    When "order.state.update" brings
      """
      {"eventType": "ShipmentStarted", "orderId": "<order>", "timestamp": "2026-01-01T11:00:00Z"}
      """
    Then operators see an "early" message that is "waiting"
    And the order is "Created"
    When "order.state.update" brings
      """
      {"eventType": "PaymentCompleted", "orderId": "<order>", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then the order becomes "InTransit"

  Scenario: A message that comes too late is noted and changes nothing
    Given user "alice" has ordered
    And somebody has set the status to "WaitingForShipment"
    And somebody has set the status to "InTransit"
    And somebody has set the status to "WaitPickup"
    When "order.state.update" brings
      """
      {"eventType": "ShipmentStarted", "orderId": "<order>", "timestamp": "2026-01-01T11:00:00Z"}
      """
    Then the history has ignored "late: ShipmentStarted"
    And the order is "WaitPickup"

  Scenario: By hand, and told as by messages
    Given user "alice" has ordered
    When somebody sets the status to "WaitingForShipment"
    Then that is done (200)
    And the answer says "orderId" is "<order>"
    And "order.state.changed" is told
      """
      {"eventType": "OrderStatusChanged", "orderId": "<order>", "fromStatus": 0, "toStatus": 2}
      """
    When somebody sets the status to "Completed"
    Then that is refused (409)
    And what is allowed is "InTransit, Canceled"
    When somebody sets the status to "Lost"
    Then that is refused as wrong (422)

  Scenario: A cancelled order stays so
    Given user "alice" has ordered
    When somebody cancels the order
    Then that is done (200)
    And the order is "Canceled"
    When "order.state.update" brings
      """
      {"eventType": "PackagePickedUp", "orderId": "<order>", "timestamp": "2026-01-01T13:00:00Z"}
      """
    Then operators see a conflict about the order
    And the order is "Canceled"

  Scenario: The clock moves an order where nobody else does
    Given the setting "SHIPMENT_STARTS_AFTER" is "1s"
    And the setting "SHIPMENT_ARRIVES_AFTER" is "1s"
    And the setting "SHIPMENT_PICKED_UP_AFTER" is "1s"
    And user "alice" has ordered
    When somebody sets the status to "WaitingForShipment"
    Then the order becomes "Completed"
    And "order.state.changed" is told of the order 4 times

  Scenario: The same message twice is told once
    Given user "alice" has ordered
    When "order.state.update" brings twice
      """
      {"eventType": "PaymentCompleted", "orderId": "<order>", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then all messages are handled
    And the order is "WaitingForShipment"
    And "order.state.changed" is told of the order 1 time

  Scenario: A message that nobody can understand
    Given user "alice" has ordered
    When "order.state.update" brings
      """
      {"eventType": "PackageLost", "orderId": "<order>", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then operators see an "unreadable" message that is "dead"
    And the order is "Created"

  Scenario: A shipment of an order that nobody has told us of waits for its payment
    When "order.state.update" brings
      """
      {"eventType": "ShipmentStarted", "orderId": "A-2026-18", "timestamp": "2026-01-01T11:00:00Z"}
      """
    Then operators see an "early" message that is "waiting"
    When "order.state.update" brings
      """
      {"eventType": "PaymentCompleted", "orderId": "A-2026-18", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then the order with the external id "A-2026-18" of user "unknown" becomes "InTransit"

  Scenario: It waits even if it was given up before
    Given the setting "RETRY_ATTEMPTS" is "2"
    And the setting "RETRY_DELAY" is "50ms"
    When "order.state.update" brings
      """
      {"eventType": "ShipmentStarted", "orderId": "A-2026-19", "timestamp": "2026-01-01T11:00:00Z"}
      """
    Then operators see an "early" message that is "dead"
    When "order.state.update" brings
      """
      {"eventType": "PaymentCompleted", "orderId": "A-2026-19", "timestamp": "2026-01-01T10:00:00Z"}
      """
    Then the order with the external id "A-2026-19" of user "unknown" becomes "InTransit"

  Scenario: What is ordered can change until it is paid
    Given user "alice" has ordered
    When the client changes the amount to 70
    Then that is done (200)
    And the order is "Created"
    Given somebody has set the status to "WaitingForShipment"
    When the client changes the amount to 80
    Then that is refused (409)

  Scenario: A completed order cannot be cancelled
    Given user "alice" has ordered
    And somebody has set the status to "WaitingForShipment"
    And somebody has set the status to "InTransit"
    And somebody has set the status to "WaitPickup"
    And somebody has set the status to "Completed"
    When somebody cancels the order
    Then that is refused (409)
    And nothing else is allowed
