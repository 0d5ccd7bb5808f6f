-- Nearly all orders pass through their first states at once, and what they leave there is dead: a
-- list of such a state reads past it, all the longer the more orders there are, as long as a share
-- of the table may be dead. A fixed number may be, however large the table has become.
alter table order_states set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000);
