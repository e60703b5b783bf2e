-- The fleet's own tables and functions, in a schema of their own beside procrastinate's. Version 1.
-- Roles reach the tables through functions that run as the owner: a worker can take and finish jobs of the queue
-- and add results, and can neither change nor delete what is there, nor put jobs into the queue.

CREATE TABLE fleet (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  schema integer NOT NULL,
  procrastinate text NOT NULL,
  stalled_s double precision NOT NULL CHECK (stalled_s >= 1)
);

-- What spaces are made for: the first machine of its label decides, so that a search is the same at every start.
CREATE TABLE families (
  label text PRIMARY KEY CHECK (length(label) <= 64),
  cpu jsonb NOT NULL,
  created timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE machines (
  name text PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
  label text NOT NULL REFERENCES families,
  version text NOT NULL CHECK (length(version) <= 64),
  code text NOT NULL CHECK (length(code) <= 64),
  threads integer NOT NULL,
  compiler text NOT NULL CHECK (length(compiler) <= 200),
  calibration jsonb,
  state text NOT NULL DEFAULT 'starting' CHECK (length(state) <= 200),
  role name NOT NULL DEFAULT session_user,
  seen timestamptz NOT NULL DEFAULT now()
);

-- Who does not get jobs: a machine or a family, set by a person or by what calibrations say.
CREATE TABLE holds (
  kind text NOT NULL CHECK (kind IN ('machine', 'family')),
  name text NOT NULL,
  state text NOT NULL CHECK (state IN ('paused', 'quarantined')),
  reason text NOT NULL,
  by_calibration boolean NOT NULL DEFAULT false,
  at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (kind, name)
);

-- json keeps the order of keys, which jsonb does not: the knobs of a schedule have one.
CREATE TABLE results (
  job_key text PRIMARY KEY CHECK (job_key ~ '^[0-9a-f]{64}$'),
  label text NOT NULL,
  machine text NOT NULL REFERENCES machines,
  attempt integer NOT NULL,
  seconds double precision NOT NULL,
  payload json NOT NULL CHECK (octet_length(payload::text) <= 4194304),
  role name NOT NULL DEFAULT session_user,
  created timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE refusals (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_key text NOT NULL,
  machine text NOT NULL,
  reason text NOT NULL,
  created timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX refusals_job_key ON refusals (job_key);

-- ---- what people look at ----

CREATE VIEW machine_status AS
  SELECT m.name, m.label,
    CASE WHEN h.name IS NOT NULL THEN h.state || ': ' || h.reason
      WHEN m.seen < now() - make_interval(secs => f.stalled_s) THEN 'gone'
      ELSE m.state END AS state,
    extract(epoch FROM now() - m.seen)::double precision AS seen_s,
    (SELECT count(*) FROM results r WHERE r.machine = m.name) AS done,
    m.threads, (m.calibration ->> 'dram_gbs')::double precision AS dram_gbs,
    (m.calibration ->> 'peak_gops')::double precision AS peak_gops, m.version, m.code
  FROM fleet f, machines m LEFT JOIN holds h ON h.kind = 'machine' AND h.name = m.name;

CREATE VIEW family_status AS
  SELECT f.label,
    (SELECT count(*) FROM machine_status m WHERE m.label = f.label AND m.state <> 'gone') AS machines,
    j.waiting, j.running, (SELECT count(*) FROM results r WHERE r.label = f.label) AS done, j.failed,
    coalesce((SELECT h.state || ': ' || h.reason FROM holds h WHERE h.kind = 'family' AND h.name = f.label), '') AS hold
  FROM families f, LATERAL (
    SELECT count(*) FILTER (WHERE status = 'todo') AS waiting, count(*) FILTER (WHERE status = 'doing') AS running,
      count(*) FILTER (WHERE status = 'failed') AS failed
    FROM procrastinate_jobs WHERE args ->> 'label' = f.label) j;

-- Machines that may get a job now.
CREATE VIEW live_machines AS
  SELECT m.name, m.label, m.code, m.threads FROM fleet f, machines m
  WHERE m.calibration IS NOT NULL AND m.seen >= now() - make_interval(secs => f.stalled_s)
    AND NOT EXISTS (SELECT FROM holds h WHERE (h.kind, h.name) IN (('machine', m.name), ('family', m.label)));

CREATE VIEW calibrations AS
  SELECT m.name, m.label, m.calibration, coalesce(h.by_calibration, false) AS by_calibration, h.name IS NOT NULL AS held
  FROM machines m LEFT JOIN holds h ON h.kind = 'machine' AND h.name = m.name
  WHERE m.calibration IS NOT NULL AND m.seen >= now() - interval '1 hour';

-- ---- of a worker ----

CREATE FUNCTION fleet_own(machine text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM machines m WHERE m.name = machine AND m.role = session_user) THEN
    RAISE insufficient_privilege USING MESSAGE = format('the machine %s is of another role', machine);
  END IF;
END;
$$;

CREATE FUNCTION fleet_register(
  machine text, its_label text, its_version text, its_code text, its_threads integer, its_compiler text, its_cpu jsonb
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO families (label, cpu) VALUES (its_label, its_cpu) ON CONFLICT DO NOTHING;
  INSERT INTO machines AS m (name, label, version, code, threads, compiler)
    VALUES (machine, its_label, its_version, its_code, its_threads, its_compiler)
    ON CONFLICT (name) DO UPDATE SET
      label = its_label, version = its_version, code = its_code, threads = its_threads, compiler = its_compiler,
      calibration = NULL, state = 'starting', seen = now()
    WHERE m.role = session_user;
  PERFORM fleet_own(machine);
END;
$$;

CREATE FUNCTION fleet_calibrated(
  machine text, its_threads integer, gbs double precision, gops double precision, its_ratio double precision,
  its_busy double precision, its_steal double precision
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM fleet_own(machine);
  UPDATE machines SET seen = now(), calibration = jsonb_build_object(
      'threads', its_threads, 'dram_gbs', gbs, 'peak_gops', gops, 'ratio', its_ratio, 'busy', its_busy,
      'steal', its_steal)
    WHERE name = machine;
END;
$$;

-- A sign of life. Returns why the machine must not work now, empty where it may, and whether it is calibrated.
CREATE FUNCTION fleet_seen(machine text, its_state text, OUT hold text, OUT calibrated boolean) LANGUAGE plpgsql AS $$
BEGIN
  UPDATE machines SET seen = now(), state = coalesce(its_state, state) WHERE name = machine AND role = session_user
    RETURNING calibration IS NOT NULL INTO calibrated;
  IF NOT FOUND THEN
    RAISE insufficient_privilege USING MESSAGE = format('the machine %s is not registered', machine);
  END IF;
  SELECT coalesce(min(h.state || ': ' || h.reason), '') INTO hold FROM holds h JOIN machines m ON m.name = machine
    WHERE (h.kind, h.name) IN (('machine', m.name), ('family', m.label));
END;
$$;

CREATE FUNCTION fleet_known(key text) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT EXISTS (SELECT FROM results WHERE job_key = key);
$$;

-- Whoever is first: a job that was done twice counts once.
CREATE FUNCTION fleet_result(
  key text, its_label text, its_machine text, its_attempt integer, its_seconds double precision, its_payload json
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM fleet_own(its_machine);
  INSERT INTO results (job_key, label, machine, attempt, seconds, payload)
    VALUES (key, its_label, its_machine, its_attempt, its_seconds, its_payload) ON CONFLICT DO NOTHING;
  IF FOUND THEN
    PERFORM pg_notify('bitgen_fleet_results', key);
    RETURN true;
  END IF;
  RETURN false;
END;
$$;

CREATE FUNCTION fleet_refuse(key text, its_machine text, its_reason text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM fleet_own(its_machine);
  INSERT INTO refusals (job_key, machine, reason) VALUES (left(key, 64), its_machine, left(its_reason, 2000));
  PERFORM pg_notify('bitgen_fleet_results', left(key, 64));
END;
$$;

-- procrastinate_finish_job_v1 and procrastinate_retry_job_v2 ask neither which worker nor which attempt: one that was
-- stopped and went on later would finish the job of another. These change nothing then.
CREATE FUNCTION fleet_finish(
  its_id bigint, its_worker bigint, its_attempts integer, its_status procrastinate_job_status
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  IF its_status NOT IN ('succeeded', 'failed', 'aborted') THEN
    RAISE invalid_parameter_value;
  END IF;
  UPDATE procrastinate_jobs SET status = its_status, abort_requested = false, attempts = attempts + 1
    WHERE id = its_id AND status = 'doing' AND worker_id = its_worker AND attempts = its_attempts;
  RETURN FOUND;
END;
$$;

CREATE FUNCTION fleet_retry(
  its_id bigint, its_worker bigint, its_attempts integer, its_wait_s double precision
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM FROM procrastinate_jobs
    WHERE id = its_id AND status = 'doing' AND worker_id = its_worker AND attempts = its_attempts FOR UPDATE;
  IF FOUND THEN
    PERFORM procrastinate_retry_job_v2(its_id, now() + make_interval(secs => its_wait_s), NULL, NULL, NULL);
    RETURN true;
  END IF;
  RETURN false;
END;
$$;

-- Jobs whose worker gave no sign of life for too long go back into the queue. The row is locked first, so that of
-- two that look at the same time one finds it, and a job that was taken anew is left alone.
CREATE FUNCTION fleet_reap() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  stalled interval;
  job record;
  found integer := 0;
BEGIN
  SELECT make_interval(secs => stalled_s) INTO stalled FROM fleet;
  FOR job IN
    SELECT j.id FROM procrastinate_jobs j
      WHERE j.status = 'doing' AND NOT EXISTS (
        SELECT FROM procrastinate_workers w WHERE w.id = j.worker_id AND w.last_heartbeat >= now() - stalled)
      ORDER BY j.id FOR UPDATE SKIP LOCKED
  LOOP
    PERFORM procrastinate_retry_job_v2(job.id, now(), NULL, NULL, NULL);
    found := found + 1;
  END LOOP;
  RETURN found;
END;
$$;

-- ---- of a coordinator ----

-- An answer that cannot be one: it goes, and its machine gets no more jobs until somebody has looked.
CREATE FUNCTION fleet_reject(key text, why text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  its_machine text;
BEGIN
  DELETE FROM results WHERE job_key = key RETURNING machine INTO its_machine;
  IF its_machine IS NOT NULL THEN
    INSERT INTO refusals (job_key, machine, reason) VALUES (key, its_machine, left('not believed: ' || why, 2000));
    INSERT INTO holds (kind, name, state, reason) VALUES ('machine', its_machine, 'quarantined', left(why, 500))
      ON CONFLICT DO NOTHING;
  END IF;
END;
$$;

CREATE FUNCTION fleet_prune(older interval) RETURNS TABLE (what text, gone bigint) LANGUAGE plpgsql AS $$
BEGIN
  IF older < interval '1 hour' THEN
    RAISE invalid_parameter_value USING MESSAGE = 'nothing younger than an hour is deleted';
  END IF;
  what := 'results';
  DELETE FROM results WHERE created < now() - older;
  GET DIAGNOSTICS gone = ROW_COUNT;
  RETURN NEXT;
  what := 'refusals';
  DELETE FROM refusals WHERE created < now() - older;
  GET DIAGNOSTICS gone = ROW_COUNT;
  RETURN NEXT;
  what := 'jobs';
  DELETE FROM procrastinate_jobs j WHERE j.status NOT IN ('todo', 'doing') AND NOT EXISTS (
    SELECT FROM procrastinate_events e WHERE e.job_id = j.id AND e.at >= now() - older);
  GET DIAGNOSTICS gone = ROW_COUNT;
  RETURN NEXT;
  what := 'machines';
  DELETE FROM machines m WHERE m.seen < now() - older AND NOT EXISTS (SELECT FROM results r WHERE r.machine = m.name);
  GET DIAGNOSTICS gone = ROW_COUNT;
  RETURN NEXT;
END;
$$;
