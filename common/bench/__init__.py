"""What a load run is and what it measured: its spec, schedule, records, report. Pure; head, agent and CLI share it."""
