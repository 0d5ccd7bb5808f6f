-- Room on each page for one more version of every order on it: nearly all orders change once, from
-- new to done, and a change that finds no room on its page is written into every index again. At 70
-- (V4) only half of the orders of real sizes found it: their neighbours change in the same batch, so
-- nothing is dead yet that could make way. It takes no more disk: what had no room was written to
-- another page, all the same.
alter table orders_p0 set (fillfactor = 50);
alter table orders_p1 set (fillfactor = 50);
alter table orders_p2 set (fillfactor = 50);
alter table orders_p3 set (fillfactor = 50);
