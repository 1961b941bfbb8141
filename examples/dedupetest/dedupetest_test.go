package dedupetest

import (
	"errors"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"offloadhook"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) Store {
		memory := new(offloadhook.Memory)
		return Store{Open: func() (offloadhook.Deduper, error) { return memory, nil }}
	})
}

// closer is a Deduper that is gone when it is closed.
type closer struct {
	offloadhook.Memory
	closed chan struct{}
}

func (c *closer) Close() error { close(c.closed); return nil }

func TestClosedOnce(t *testing.T) {
	Run(t, func(*testing.T) Store {
		c := &closer{closed: make(chan struct{})}
		return Store{Open: func() (offloadhook.Deduper, error) { return c, nil }}
	})
}

func TestJournal(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("on Windows the files of a journal that was taken over stay, and with them what it refuses")
	}
	Run(t, func(t *testing.T) Store {
		dir := t.TempDir()
		return Store{Open: func() (offloadhook.Deduper, error) { return offloadhook.OpenJournal(dir, 0) }}
	})
}

// TestModels shows that the checks accept each kind of store for which they make a difference.
func TestModels(t *testing.T) {
	for name, open := range models {
		t.Run(name, func(t *testing.T) {
			for _, c := range checks {
				synctest.Test(t, func(t *testing.T) {
					errs, skipped := c.run(open(""))
					if len(errs) > 0 || skipped != "" && name == "shared" {
						t.Errorf("%s: %v%s", c.name, errors.Join(errs...), skipped)
					}
				})
			}
		})
	}
}

// TestFaults shows that each check can fail: it finds the stores with the faults that it is there for.
func TestFaults(t *testing.T) {
	used := make(map[string]bool)
	for _, f := range []struct {
		fault, model string
		found        []string // by these checks, among others; nil: by none, because it is no fault
	}{
		{"claims race", "plain", []string{"one winner"}},
		{"claims race", "shared", []string{"one winner"}},
		{"claims are per handle", "shared", []string{"one winner", "owners"}},
		{"claims are per handle", "replicated", []string{"one winner"}},
		{"claims of the dead are lost", "shared", []string{"takeover"}},
		{"done forgets", "plain", []string{"one winner", "done", "reopen"}},
		{"done forgets", "shared", []string{"one winner", "done", "reopen"}},
		{"done is never recorded", "shared", []string{"order", "reopen", "cancelled done"}},
		{"give-up keeps the claim", "plain", []string{"one winner", "done", "reopen"}},
		{"give-up keeps the claim", "shared", []string{"one winner", "done", "give-up"}},
		{"give-up is done", "plain", []string{"done"}},
		{"give-up does not rest", "shared", []string{"give-up"}},
		{"give-up does not rest", "exclusive", []string{"give-up"}},
		{"give-up rests for ever", "shared", []string{"give-up"}},
		{"give-up is lost", "exclusive", []string{"give-up", "reopen"}},
		{"give-up is remembered", "shared", []string{"give-up"}},
		{"give-up is remembered", "exclusive", []string{"give-up"}},
		{"give-up comes back at every call", "shared", []string{"give-up"}},
		{"done ends the case", "shared", []string{"bytes"}},
		{"done ends the case", "exclusive", []string{"bytes"}},
		{"done needs no claim", "plain", []string{"done that is not held"}},
		{"done needs no claim", "shared", []string{"done that is not held", "late done"}},
		{"done of what is not held errs", "plain", []string{"done that is not held"}},
		{"done needs no owner", "replicated", []string{"done that is not held"}},
		{"done needs no owner", "shared", []string{"done that is not held", "late done"}},
		{"done needs no owner", "leased", []string{"done that is not held", "late done"}},
		{"done needs no owner", "exclusive", []string{"late done"}},
		{"late done errs", "shared", []string{"late done"}},
		{"ids fold case", "plain", []string{"ids"}},
		{"ids are cut", "plain", []string{"ids"}},
		{"ids are trimmed", "plain", []string{"ids"}},
		{"ids are file names", "plain", []string{"ids"}},
		{"ids are of bodies", "plain", []string{"done"}},
		{"ids are of cases", "plain", []string{"done"}},
		{"a cancelled claim is kept", "shared", []string{"cancelled claim"}},
		{"a cancelled claim is kept", "leased", nil}, // its receiver calls Done
		{"a cancelled claim is kept for ever", "plain", []string{"cancelled claim"}},
		{"a cancelled claim is pending and free", "shared", []string{"cancelled claim"}},
		{"a cancelled claim is fresh and an error", "plain", []string{"cancelled claim"}},
		{"a cancelled claim is no claim", "plain", []string{"cancelled claim"}},
		{"a cancelled claim hangs", "plain", []string{"cancelled claim"}},
		{"a cancelled done hangs", "plain", []string{"cancelled done"}},
		{"a cancelled done does nothing", "shared", []string{"cancelled done"}},
		{"a cancelled pending hangs", "shared", []string{"cancelled pending"}},
		{"a cancelled pending ends in silence", "shared", []string{"cancelled pending"}},
		{"a cancelled pending forgets", "shared", []string{"cancelled pending"}},
		{"storage is lost", "shared", []string{"reopen", "takeover", "late done"}},
		{"storage is lost", "exclusive", []string{"reopen", "takeover", "late done", "owners"}},
		{"what is done is lost", "exclusive", []string{"reopen"}},
		{"close marks all done", "shared", []string{"reopen"}},
		{"bodies are trimmed", "shared", []string{"bytes"}},
		{"bodies are made valid", "exclusive", []string{"bytes"}},
		{"bodies are compacted", "shared", []string{"bytes"}},
		{"bodies are cut", "shared", []string{"bytes"}},
		{"bodies are overwritten", "shared", []string{"bytes"}},
		{"envelopes are bare", "shared", []string{"bytes"}},
		{"bodies are touched", "shared", []string{"bytes"}},
		{"newest first", "shared", []string{"order", "snapshot", "takeover"}},
		{"order of ids", "shared", []string{"order"}},
		{"twice", "shared", []string{"order"}},
		{"no snapshot", "shared", []string{"snapshot"}},
		{"locked while read", "shared", []string{"snapshot"}},
		{"left early, locked", "shared", []string{"left early"}},
		{"left early, gone", "shared", []string{"left early"}},
		{"owners share", "shared", []string{"owners"}},
		{"two owners", "exclusive", []string{"owners"}},
		{"takeover fails", "shared", []string{"takeover", "late done"}},
		{"takeover fails", "leased", []string{"late done"}},
		{"heirs share", "shared", []string{"one heir"}},
		{"takeover reverses", "shared", []string{"takeover"}},
		{"takeover revives", "shared", []string{"takeover"}},
	} {
		used[f.model] = true
		for _, name := range f.found {
			used[name] = true
		}
		t.Run(f.model+", "+f.fault, func(t *testing.T) {
			for _, c := range checks {
				want := slices.Contains(f.found, c.name)
				if !want && len(f.found) > 0 {
					continue
				}
				synctest.Test(t, func(t *testing.T) {
					if errs, _ := c.run(models[f.model](f.fault)); want != (len(errs) > 0) {
						t.Errorf("%s finds %v", c.name, errs)
					}
					time.Sleep(2 * time.Hour) // what hangs, hangs for an hour
				})
			}
		})
	}
	for _, c := range checks {
		if !used[c.name] {
			t.Errorf("no fault is tried for the check %q", c.name)
		}
	}
	for name := range models {
		if !used[name] {
			t.Errorf("no fault is tried in the model %q", name)
		}
	}
}
