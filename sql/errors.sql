-- The list of errors
SELECT * FROM millm.errors ORDER BY sqlstate, name;

-- One that a program catches by its SQLSTATE
DO $$
BEGIN
	PERFORM millm.load('nobody');
EXCEPTION WHEN SQLSTATE 'ML001' THEN
	RAISE NOTICE '%', SQLERRM;
END
$$;
