package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// outcome is what became of a claim in one namespace.
type outcome struct {
	kind outcomeKind
	// counter is the revision that was delivered last, zero where none was.
	counter uint64
	// message says what is in the way.
	message string
}

type outcomeKind uint8

const (
	// pending: selected, and not looked at yet.
	pending outcomeKind = iota
	// delivered: the Secret is there, with the content of the outcome's counter.
	delivered
	// excluded: selected, but for --excluded-namespaces.
	excluded
	// conflicted: an older resource claims the same Secret.
	conflicted
	// foreign: a Secret that is not ours has the name.
	foreign
	// failed: the API server refused the write.
	failed
)

// repairs are how often in a row one Secret was repaired, and when last.
type repairs struct {
	// expectation is what it was repaired to.
	expectation *impsync.Expectation
	times       int
	last        time.Time
}

const (
	// promptRepairs are made at once; whoever undoes them all is at work himself, and each
	// further one waits, from a second doubling to repairMaxDelay.
	promptRepairs  = 3
	repairMaxDelay = 5 * time.Minute
)

// wait is for how long the next repair must wait.
func (r repairs) wait(now time.Time) time.Duration {
	if r.times < promptRepairs {
		return 0
	}
	delay := repairMaxDelay
	if doublings := r.times - promptRepairs; doublings < 9 {
		delay = min(delay, time.Second<<doublings)
	}
	return r.last.Add(delay).Sub(now)
}

// undeletable is a Secret that is not wanted any more and could not be deleted.
type undeletable struct {
	owner   types.UID
	message string
}

// plausibleCounter bounds the counters of others that ours goes beyond: what a broken
// writer puts there must not use the numbers up.
const plausibleCounter = 1 << 62

// verb is what is done with a target Secret.
type verb uint8

const (
	leave verb = iota
	create
	update
	adopt
	remove
)

func (v verb) String() string { return [...]string{"leave", "create", "update", "adopt", "delete"}[v] }

// decision is what is to be done with one target Secret.
type decision struct {
	verb verb
	// winner is the claim whose content the Secret gets, or had (remove).
	winner   *claim
	target   impsync.Target
	owners   []impsync.ResourceRef
	existing impsync.Existing
	// repairs is set where the write undoes what somebody else did.
	repairs *repairs
	// byMetadata: the namespace's labels or annotations could have it selected, and byPods:
	// so could the Pods in it; before deleting, the one is read, or the reports are.
	byMetadata, byPods bool
	// holders are live resources whose owner references an update takes off, as they do not
	// claim the Secret any more.
	holders []impsync.ResourceRef
}

var (
	// errAgain asks for another look at once.
	errAgain = errors.New("changed meanwhile")
	// errBehind asks for another look when the watches have told of what the API server says.
	errBehind = errors.New("a watch is behind")
)

// mirrorTargets starts the watch of the Secrets of a name. The caller holds the lock.
func (t *term) mirrorTargets(name string) {
	if _, ok := t.targets[name]; ok {
		return
	}
	mirror := impsync.NewMirror(impsync.MirrorConfig[impsync.Existing]{
		Name: "Secrets named " + name, Example: &metav1.PartialObjectMetadata{}, Log: t.log,
		ListWatch: t.secrets.ListWatch(name),
		Convert:   func(o runtime.Object) impsync.Existing { return impsync.ExistingOf(o.(*metav1.PartialObjectMetadata)) },
		OnChange: func(key types.NamespacedName, old, current *impsync.Existing) {
			if old != nil && current != nil && old.ResourceVersion == current.ResourceVersion {
				return // our own write, which is known
			}
			t.enqueueTarget(targetKey{key.Namespace, key.Name})
			t.change(func() { t.enqueueAccounts(key.Namespace) })
		},
		Version: func(x impsync.Existing) string { return x.ResourceVersion },
	})
	t.targets[name] = mirror
	t.background(mirror.Run)
	t.background(func(ctx context.Context) {
		select {
		case <-mirror.Synced():
			t.mu.Lock()
			defer t.mu.Unlock()
			for _, c := range t.byTarget[name] {
				t.expectOutcomes(c)
				t.statusDirty(c.ref.UID)
			}
			t.enqueueNamespaces(name)
			t.enqueueAllAccounts()
		case <-ctx.Done():
		}
	})
}

func (t *term) enqueueTarget(key targetKey) { t.targetQueue.Add(key) }

// enqueueNamespaces has the Secret of this name looked at in every namespace.
func (t *term) enqueueNamespaces(name string) {
	t.namespaces.Range(func(key types.NamespacedName, _ namespaceMeta) bool {
		t.enqueueTarget(targetKey{key.Name, name})
		return true
	})
}

// enqueueTargetsOf has everything looked at that concerns a claim as it is now: where it
// has an outcome, be it that another claims the Secret, and all Secrets that are its own or
// carry its owner reference, also those of an earlier name. The caller holds the lock.
func (t *term) enqueueTargetsOf(c *claim) {
	if name := c.rendered.Target.Name(); name != "" {
		for namespace := range c.outcomes {
			t.enqueueTarget(targetKey{namespace, name})
		}
	}
	for name, mirror := range t.targets {
		mirror.Range(func(key types.NamespacedName, x impsync.Existing) bool {
			if x.OwnerUID == c.ref.UID || x.HasOwner(c.ref.UID) {
				t.enqueueTarget(targetKey{key.Namespace, name})
			}
			return true
		})
	}
}

// enqueueAllTargets has everything looked at. The caller holds the lock.
func (t *term) enqueueAllTargets() {
	for name, mirror := range t.targets {
		if len(t.byTarget[name]) > 0 {
			t.enqueueNamespaces(name)
		}
		mirror.Range(func(key types.NamespacedName, _ impsync.Existing) bool {
			t.enqueueTarget(targetKey{key.Namespace, name})
			return true
		})
	}
}

func (t *term) namespaceChanged(key types.NamespacedName, old, current *namespaceMeta) {
	if old != nil && current != nil && old.equal(*current) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.started {
		return
	}
	for name := range t.byTarget {
		t.enqueueTarget(targetKey{key.Name, name})
	}
	t.enqueueAccounts(key.Name)
}

// reconcileTarget brings one target Secret to where it should be.
func (t *term) reconcileTarget(ctx context.Context, key targetKey) error {
	for range 5 {
		d := t.decide(key, time.Now())
		if d.verb == leave {
			return nil
		}
		err := t.perform(ctx, key, d)
		if err == nil && d.repairs != nil {
			t.repaired(key, d)
		}
		if errors.Is(err, errAgain) || err != nil && impsync.ClassifyError(err) == impsync.ClassConflict {
			err = t.reread(ctx, key, d)
		}
		if err != nil {
			t.conclude(key, d, err)
			return err
		}
		// What was done is judged like anything else that is there: what was decided may
		// have been overtaken meanwhile.
	}
	// Somebody writes as often as we do, or the server changes what we write: with backoff,
	// then, and as a repair, which has an ever longer one.
	err := fmt.Errorf("target Secret %s: %w", key, errAgain)
	d := t.decide(key, time.Now())
	t.conclude(key, d, err)
	if d.verb == create || d.verb == update {
		t.noteDelivered(key, d)
	}
	return err
}

// noteDelivered notes that a Secret was written, though it did not stay so.
func (t *term) noteDelivered(key targetKey, d decision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o, ok := d.winner.outcomes[key.namespace]; ok && o.kind == failed {
		o.counter = d.target.Revision().Counter
		d.winner.outcomes[key.namespace] = o
	}
}

// contentDelivered notes that a Secret is as it should be but for references of others.
func (t *term) contentDelivered(key targetKey, d decision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byTarget[key.name][d.winner.ref.UID] == d.winner {
		t.note(d.winner, key.namespace, &outcome{kind: delivered, counter: d.target.Revision().Counter})
	}
}

// decide compares what should be with what is, and notes the outcome of every claim that
// needs no write.
func (t *term) decide(key targetKey, now time.Time) decision {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.judge(key, now)
	if u, ok := t.undeletable[key]; ok && d.verb != remove {
		delete(t.undeletable, key)
		t.statusDirty(u.owner)
	}
	return d
}

func (t *term) judge(key targetKey, now time.Time) decision {
	mirror := t.targets[key.name]
	if mirror == nil {
		return decision{}
	}
	meta, there := t.namespaces.Get(types.NamespacedName{Name: key.namespace})
	if !there || meta.terminating {
		for uid, c := range t.byTarget[key.name] {
			t.demand.forget(demandKey{key.namespace, uid})
			t.note(c, key.namespace, nil)
		}
		return decision{}
	}
	select {
	case <-mirror.Synced():
	default:
		return decision{} // looked at again once it is
	}
	existing, exists := mirror.Get(types.NamespacedName{Namespace: key.namespace, Name: key.name})

	claimants := t.claimants(key, meta, existing, exists, now)
	if len(claimants) == 0 {
		return t.decidePrune(existing, exists, key, meta, now)
	}
	if owner := t.claims[existing.OwnerUID]; exists && owner != nil && owner.undecided() {
		return decision{} // it stays its own; looked at again once that is known
	}
	winner := claimants[0]
	for _, loser := range claimants[1:] {
		t.note(loser, key.namespace, &outcome{kind: conflicted, message: fmt.Sprintf("the older ImagePullSecret %s claims the same Secret", winner.ref.Name)})
	}
	d := decision{winner: winner, existing: existing}
	for _, c := range claimants {
		d.owners = append(d.owners, c.ref)
	}
	expectation, err := winner.expect(d.owners)
	if err != nil {
		t.note(winner, key.namespace, &outcome{kind: failed, message: err.Error()})
		return decision{}
	}
	d.target = expectation.Target()
	counter := winner.rendered.Target.Revision().Counter
	was, ok := winner.outcomes[key.namespace]
	content := false // it is delivered, and only owner references are not what they should be
	switch {
	case exists && existing.Deleting:
		// Somebody's finalizer holds it; its end is an event.
		t.note(winner, key.namespace, &outcome{kind: failed, message: "the Secret is being deleted, and a finalizer holds it"})
		return decision{}
	case !exists:
		d.verb = create
	case existing.Ownership == impsync.Foreign:
		t.note(winner, key.namespace, &outcome{kind: foreign, message: "a Secret of that name is there that is not imps's, and is left alone"})
		return decision{}
	case counterOf(existing, winner.ref.UID) > counter:
		// Content of a leader after us, or one whose traces are lost: not overwritten
		// before the Lease was asked, and then with a higher counter.
		winner.minCounter = max(winner.minCounter, existing.Revision.Counter)
		t.resourceQueue.Add(winner.ref.UID)
		t.note(winner, key.namespace, &outcome{kind: pending, counter: winner.outcomes[key.namespace].counter})
		return decision{}
	case existing.Ownership != impsync.Ours:
		d.verb = adopt
	case !expectation.Met(existing):
		d.verb = update
		d.holders = t.holders(d.owners, existing)
		content = winner.contentMet(d.owners, d.holders, existing)
	default:
		t.note(winner, key.namespace, &outcome{kind: delivered, counter: counter})
		return decision{}
	}
	if was.counter == counter { // it was delivered, and somebody has undone that
		r := winner.repairs[key.namespace]
		if r.expectation != expectation || now.Sub(r.last) > 2*repairMaxDelay {
			r = repairs{expectation: expectation}
		}
		if wait := r.wait(now); wait > 0 {
			t.targetQueue.AddAfter(key, wait)
			if content {
				t.note(winner, key.namespace, &outcome{kind: delivered, counter: counter})
				return decision{}
			}
			t.note(winner, key.namespace, &outcome{
				kind: failed, counter: counter,
				message: "somebody changes or deletes the Secret whenever it is repaired; it is repaired ever more seldom, every 5 minutes in the end",
			})
			return decision{}
		}
		d.repairs = &r
	}
	switch {
	case content && (was.counter != counter || was.kind != failed): // else the last try has failed
		t.note(winner, key.namespace, &outcome{kind: delivered, counter: counter})
	case !ok || was.kind == excluded:
		t.note(winner, key.namespace, &outcome{kind: pending, counter: was.counter})
	}
	return d
}

// repaired notes a repair that was made.
func (t *term) repaired(key targetKey, d decision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d.repairs.times++
	d.repairs.last = time.Now()
	d.winner.repairs[key.namespace] = *d.repairs
}

// inForce reports whether a resource is there and not going. The caller holds the lock.
func (t *term) inForce(uid types.UID) bool {
	r := t.byUID[uid]
	return r != nil && r.DeletionTimestamp == nil
}

// counterOf is the counter of a resource that imps itself has put on a Secret; zero where
// it has not.
func counterOf(existing impsync.Existing, uid types.UID) uint64 {
	if existing.Ownership != impsync.Ours || existing.Revision.UID != uid || existing.Revision.Counter >= plausibleCounter {
		return 0
	}
	return existing.Revision.Counter
}

// expectOutcomes notes that a claim which has come into force, or selects anew, is to be
// looked at everywhere, so that no status counts less than what is selected. The caller
// holds the lock.
func (t *term) expectOutcomes(c *claim) {
	name := c.rendered.Target.Name()
	mirror := t.targets[name]
	if mirror == nil {
		return
	}
	for namespace, was := range c.outcomes {
		c.outcomes[namespace] = outcome{kind: pending, counter: was.counter}
		if _, there := t.namespaces.Get(types.NamespacedName{Name: namespace}); !there {
			delete(c.outcomes, namespace)
		}
	}
	t.namespaces.Range(func(key types.NamespacedName, meta namespaceMeta) bool {
		if meta.terminating {
			return true
		}
		state := t.demand.states[demandKey{key.Name, c.ref.UID}]
		if !c.selection.SelectsByRule(key.Name, meta.labels, meta.annotations) && (state == nil || state.nodes == 0) {
			return true
		}
		if t.config.Excluded.Matches(key.Name) {
			c.outcomes[key.Name] = outcome{kind: excluded}
			return true
		}
		existing, _ := mirror.Get(types.NamespacedName{Namespace: key.Name, Name: name})
		o := outcome{kind: pending, counter: counterOf(existing, c.ref.UID)}
		if o.counter == c.rendered.Target.Revision().Counter {
			o.kind = delivered // as far as is known, so that a new leader's status does not waver
		}
		c.outcomes[key.Name] = o
		return true
	})
}

// claimants returns the claims that the namespace selects, the winner first. It notes the
// outcome of those that it does not.
func (t *term) claimants(key targetKey, meta namespaceMeta, existing impsync.Existing, exists bool, now time.Time) []*claim {
	var claimants []*claim
	for uid, c := range t.byTarget[key.name] {
		if !t.inForce(uid) {
			continue // its end is on its way
		}
		selected := c.selection.SelectsByRule(key.namespace, meta.labels, meta.annotations)
		if !selected && c.selection.HasPodRules() {
			selected = t.demanded(c, demandKey{key.namespace, uid}, existing, exists, now)
		}
		switch {
		case !selected:
			// One that is pruned keeps its outcome until it is gone.
			if !exists || existing.OwnerUID != uid || existing.Ownership == impsync.Foreign || existing.Ownership == impsync.Restored {
				t.note(c, key.namespace, nil)
			}
		case t.config.Excluded.Matches(key.namespace):
			t.note(c, key.namespace, &outcome{kind: excluded})
		default:
			claimants = append(claimants, c)
		}
	}
	slices.SortFunc(claimants, func(a, b *claim) int { return a.ref.Compare(b.ref) })
	return claimants
}

// demanded reports whether Pods select the namespace, or did until a moment ago: a Secret
// that is there stays a while after the last demand ended, and one that a node has just
// created stays until its report must have arrived.
func (t *term) demanded(c *claim, key demandKey, existing impsync.Existing, exists bool, now time.Time) bool {
	state := t.demand.states[key]
	if state != nil && state.nodes > 0 {
		return true
	}
	if !exists || existing.OwnerUID != key.uid || existing.Ownership == impsync.Restored || existing.Ownership == impsync.Foreign {
		// What it has claimed as well it may keep, if nobody else does: see decidePrune.
		others := exists && existing.Ownership == impsync.Ours && existing.OwnerUID != key.uid && existing.HasOwner(key.uid)
		if !others || !t.inForce(existing.OwnerUID) && !t.leftBehind(existing) {
			t.demand.forget(key)
		}
		return false
	}
	if state == nil {
		if _, ruled := c.outcomes[key.namespace]; ruled {
			return false // a namespace rule selected it until now
		}
	}
	return t.lingers(key, c.rendered.Target.Name(), now)
}

// lingers reports whether a Secret stays since the last demand, or the first look at it
// where none was seen, was a moment ago; then it is looked at again.
func (t *term) lingers(key demandKey, name string, now time.Time) bool {
	state := t.demand.states[key]
	if state == nil {
		state = t.demand.linger(key, now)
	}
	if state.unknown && t.withoutAgent > 0 {
		// Whether its Pods are on a node whose agent is not there yet, nobody knows.
		state.ended = now
	}
	left := t.config.DemandLinger - now.Sub(state.ended)
	if left <= 0 {
		return false
	}
	t.targetQueue.AddAfter(targetKey{key.namespace, name}, left)
	return true
}

// decidePrune decides about a Secret that no claim selects.
func (t *term) decidePrune(existing impsync.Existing, exists bool, key targetKey, meta namespaceMeta, now time.Time) decision {
	if !exists || existing.Deleting || existing.Ownership == impsync.Foreign || existing.Ownership == impsync.Restored {
		return decision{}
	}
	owner := existing.OwnerUID
	if t.awaited(key, meta, owner) {
		t.targetQueue.AddAfter(key, impsync.RecheckSoonest)
		return decision{}
	}
	// Others that have claimed it hold it with their owner references. Where it is not known
	// of one whether it still does, it is looked at again once it is. One with Pod rules may
	// want it without a word yet: as in the case of its own Secrets where it was left to it,
	// else where the reports have told so.
	d := decision{verb: remove, existing: existing}
	d.byMetadata, d.byPods = t.rules(key)
	left, lingers := t.leftBehind(existing), false
	var holder *claim
	for _, uid := range existing.OwnerReferences {
		if uid == owner || !t.inForce(uid) {
			continue
		}
		c := t.claims[uid]
		if c == nil || !c.wordCounts() {
			return decision{}
		}
		holder = c
		if c.hasPodRules() {
			demand := demandKey{key.namespace, uid}
			lingers = (left || t.demand.states[demand] != nil) && t.lingers(demand, key.name, now) || lingers
		}
	}
	if lingers {
		return decision{}
	}
	if c := t.claims[owner]; c != nil && t.inForce(owner) {
		if !c.wordCounts() {
			return decision{}
		}
		d.winner = c
		return d
	}
	if left && holder != nil {
		d.winner = holder
		return d
	}
	orphaned, gone := t.gone[owner]
	if gone && !orphaned && existing.HasOwner(owner) {
		return d
	}
	if !gone && t.byUID[owner] == nil {
		// It was gone before this term, it seems. The garbage collector, which has the same
		// to do, does not hear of it where a watch of it broke and another resource of that
		// name was created meanwhile.
		t.resourceQueue.Add(owner)
	}
	// Or the owner is going. Or its Secrets were orphaned: they stay until a resource that
	// selects them adopts them.
	return decision{}
}

// wordCounts reports whether it is known what the claim selects: it was rendered in this
// term or withdrawn, and nothing keeps its last good selection in force.
func (c *claim) wordCounts() bool {
	return c.problem == nil && c.failure == nil && (!c.rendered.Target.IsZero() || c.withdrawn)
}

func (c *claim) hasPodRules() bool { return c.selection != nil && c.selection.HasPodRules() }

// awaited reports whether something that is not in force yet may want the Secret: whatever
// the owner says by now, or what another resource with this target name does. The caller
// holds the lock.
func (t *term) awaited(key targetKey, meta namespaceMeta, owner types.UID) bool {
	for uid, r := range t.byUID {
		if uid != owner && r.Spec.Target.Secret.Name != key.name || !t.inForce(uid) {
			continue
		}
		if c := t.claims[uid]; c != nil && c.settled == r.Generation {
			continue
		}
		if uid == owner {
			return true
		}
		selection, _, err := impsync.CompileSelection(r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods)
		if err == nil && (selection.HasPodRules() || selection.SelectsByRule(key.namespace, meta.labels, meta.annotations)) {
			return true
		}
	}
	return false
}

// rules reports by what else than its name the namespace could be selected by a claim of the
// Secret. The caller holds the lock.
func (t *term) rules(key targetKey) (byMetadata, byPods bool) {
	if t.config.Excluded.Matches(key.namespace) {
		return false, false
	}
	for _, claimant := range t.byTarget[key.name] {
		byMetadata = byMetadata || claimant.selection.HasMetadataRules()
		byPods = byPods || claimant.selection.HasPodRules()
	}
	return byMetadata, byPods
}

// leftBehind reports whether a Secret is that of a dead resource which another may have
// claimed as well: to that one it was to be handed over. Where nobody has told of the end,
// the garbage collector has, which takes the dead one's owner reference off. The caller
// holds the lock.
func (t *term) leftBehind(existing impsync.Existing) bool {
	owner := existing.OwnerUID
	orphaned, gone := t.gone[owner]
	switch {
	case existing.Ownership != impsync.Ours || orphaned:
		return false
	case gone && existing.HasOwner(owner):
		return true
	default:
		return existing.Revision.UID == owner && t.byUID[owner] == nil && (gone || !existing.HasOwner(owner))
	}
}

// holders returns the live resources whose owner references are on a Secret that they do
// not claim any more. The garbage collector would take it, were they taken off and all
// other owners deleted.
func (t *term) holders(owners []impsync.ResourceRef, existing impsync.Existing) (holders []impsync.ResourceRef) {
	for _, uid := range existing.OwnerReferences {
		if t.inForce(uid) && !slices.ContainsFunc(owners, func(owner impsync.ResourceRef) bool { return owner.UID == uid }) {
			holders = append(holders, impsync.RefOf(t.byUID[uid]))
		}
	}
	return holders
}

// contentMet reports whether a Secret is as it should be but for the owner references of
// others than the winner.
func (c *claim) contentMet(owners, holders []impsync.ResourceRef, existing impsync.Existing) bool {
	present := slices.DeleteFunc(slices.Concat(owners, holders), func(ref impsync.ResourceRef) bool { return !existing.HasOwner(ref.UID) })
	if !slices.Contains(present, c.ref) {
		return false
	}
	slices.SortFunc(present, impsync.ResourceRef.Compare)
	e, err := c.expect(present)
	return err == nil && e.Met(existing)
}

// unsettled reports whether it is not known what a resource wants now. The caller holds the
// lock.
func (t *term) unsettled(uid types.UID) bool {
	c, r := t.claims[uid], t.byUID[uid]
	return c == nil || r == nil || c.settled != r.Generation || !c.wordCounts()
}

// expect returns the expectation for the claim's target with these owners.
func (c *claim) expect(refs []impsync.ResourceRef) (*impsync.Expectation, error) {
	uids := make([]string, 0, len(refs))
	for _, ref := range refs {
		uids = append(uids, string(ref.UID))
	}
	owners := strings.Join(uids, " ")
	if e := c.expectations[owners]; e != nil {
		return e, nil
	}
	e, err := expectationOf(c.rendered.Target, refs)
	if err != nil {
		return nil, err
	}
	c.expectations[owners] = e
	return e, nil
}

// expectationOf returns the expectation for a target with these owners.
func expectationOf(target impsync.Target, owners []impsync.ResourceRef) (*impsync.Expectation, error) {
	if len(owners) > 1 || !slices.Equal(target.Owners(), []types.UID{owners[0].UID}) {
		var err error
		if target, err = target.WithOwners(owners); err != nil {
			return nil, err
		}
	}
	return impsync.NewExpectation(target)
}

// note records the outcome of a claim in a namespace; nil forgets it.
func (t *term) note(c *claim, namespace string, o *outcome) {
	was, ok := c.outcomes[namespace]
	switch {
	case o == nil && !ok, o != nil && ok && was == *o:
		return
	case o == nil:
		delete(c.outcomes, namespace)
		delete(c.repairs, namespace)
	default:
		c.outcomes[namespace] = *o
	}
	if ok == (o == nil) {
		t.enqueueAccounts(namespace) // it is selected, or is not any more
	}
	t.statusDirty(c.ref.UID)
}

// perform does what was decided. Conflicts come back as errors of their class.
func (t *term) perform(ctx context.Context, key targetKey, d decision) error {
	switch d.verb {
	case leave:
	case create, update:
		owners, unsure := t.references(ctx, key, d)
		if owners == nil {
			return unsure
		}
		target := d.target
		if unsure != nil { // the rest does not wait
			expectation, err := expectationOf(target, owners)
			if err != nil {
				return err
			}
			if expectation.Met(d.existing) {
				t.contentDelivered(key, d)
				return unsure
			}
			target = expectation.Target()
		}
		m, err := t.write(ctx, key.namespace, target, d)
		t.config.Metrics.SecretWrite(duty, d.verb.String(), err)
		if err != nil {
			return err
		}
		t.know(key, m)
	case adopt:
		if !d.existing.HasOwner(d.winner.ref.UID) {
			if err := t.confirmAlive(ctx, d.winner.ref); err != nil {
				return err
			}
		}
		m, err := t.secrets.Get(ctx, key.namespace, key.name)
		if err != nil {
			return err
		}
		if m.ResourceVersion != d.existing.ResourceVersion {
			return errAgain
		}
		m, err = t.secrets.Adopt(ctx, m)
		t.config.Metrics.SecretWrite(duty, d.verb.String(), err)
		if err != nil {
			return err
		}
		t.know(key, m)
		return errAgain // and now its content
	case remove:
		if d.winner != nil { // which lives, and does not want it as far as is known
			if err := t.confirmUnwanted(ctx, key, d.byMetadata, d.byPods, nil); err != nil {
				return err
			}
			switch again := t.decide(key, time.Now()); {
			case again.verb != remove:
				return nil
			case again.byMetadata && !d.byMetadata || again.byPods && !d.byPods:
				return errAgain // there is more to ask by now
			}
		}
		err := t.secrets.Delete(ctx, key.namespace, key.name, d.existing.UID, d.existing.ResourceVersion)
		t.config.Metrics.SecretWrite(duty, d.verb.String(), err)
		if err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		t.forget(key, d.existing)
		t.change(func() { t.enqueueAccounts(key.namespace) })
	}
	return nil
}

func (t *term) write(ctx context.Context, namespace string, target impsync.Target, d decision) (*metav1.PartialObjectMetadata, error) {
	if d.verb == create {
		return t.secrets.Create(ctx, namespace, target)
	}
	return t.secrets.Update(ctx, namespace, target, d.existing)
}

// confirmResources asks for all resources and returns errBehind where they are not those
// that our watch has told of: it may be behind the one that told of the namespace.
func (t *term) confirmResources(ctx context.Context) error {
	live, err := t.liveResources(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	current := len(live) == len(t.byUID)
	for i := range live {
		known := t.byUID[live[i].UID]
		current = current && known != nil && known.Generation == live[i].Generation &&
			known.DeletionTimestamp.IsZero() == live[i].DeletionTimestamp.IsZero()
	}
	if !current {
		return errBehind
	}
	return nil
}

// references returns whose owner references a write puts on a Secret: those that claim it,
// but of others than the winner only ones that are known to live, and until it is known that
// they do not claim it any more, the live ones whose reference is on it. Where they are not
// just those that claim it, the error is errBehind with the reason; where the winner itself
// may not be alive, there are none. While a resource is being orphaned, or is gone, a
// reference to it that is put back would get the Secret collected.
func (t *term) references(ctx context.Context, key targetKey, d decision) (owners []impsync.ResourceRef, unsure error) {
	asking, cancel := context.WithTimeout(ctx, impsync.CallTimeout) // one after the other could take long
	defer cancel()
	for _, owner := range d.owners {
		// Of what was there and is gone, the garbage collector may know why.
		first := d.verb == create && d.repairs == nil && owner == d.winner.ref
		if !first && !d.existing.HasOwner(owner.UID) {
			err := asking.Err()
			if err == nil {
				err = t.confirmAlive(ctx, owner)
			}
			if err != nil && owner == d.winner.ref {
				return nil, err
			} else if err != nil {
				unsure = fmt.Errorf("%w: %w", errBehind, err)
				continue
			}
		}
		owners = append(owners, owner)
	}
	if len(d.holders) == 0 {
		return owners, unsure
	}
	if err := t.confirmReleased(ctx, key, d); err != nil {
		unsure = fmt.Errorf("%w: %w", errBehind, err)
		owners = append(owners, d.holders...)
		slices.SortFunc(owners, impsync.ResourceRef.Compare)
	}
	return owners, unsure
}

// confirmReleased returns an error where one of the holders of a Secret may claim it, though
// it does not as far as is known, or nobody can be asked.
func (t *term) confirmReleased(ctx context.Context, key targetKey, d decision) error {
	var holders []types.UID
	for _, holder := range d.holders {
		holders = append(holders, holder.UID)
	}
	t.mu.Lock()
	unsettled := slices.ContainsFunc(holders, t.unsettled)
	byMetadata, byPods := t.rules(key)
	t.mu.Unlock()
	if unsettled {
		return errBehind
	}
	if err := t.confirmUnwanted(ctx, key, byMetadata, byPods, holders); err != nil {
		return err
	}
	if again := t.decide(key, time.Now()); !slices.Equal(again.holders, d.holders) {
		return errBehind // it was, and is not any more
	}
	return nil
}

// confirmUnwanted asks for all that could tell that a Secret is wanted after all, by these resources or, nil, by any, and
// returns errBehind where something does.
func (t *term) confirmUnwanted(ctx context.Context, key targetKey, byMetadata, byPods bool, only []types.UID) error {
	err := t.confirmResources(ctx)
	if err == nil && byMetadata {
		err = t.confirmUnselected(ctx, key, only)
	}
	if err == nil && byPods {
		err = t.confirmUndemanded(ctx, key.namespace)
	}
	return err
}

// confirmUnselected asks for the namespace and returns errBehind where a namespace rule
// selects it, of these resources or, nil, of any: its labels may have changed, and an agent
// have seen that, before our watch brings them.
func (t *term) confirmUnselected(ctx context.Context, key targetKey, only []types.UID) error {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	list, err := t.metadata.Resource(impsync.NamespaceResource).List(ctx, metav1.ListOptions{
		FieldSelector: metav1.ObjectNameField + "=" + key.namespace,
	})
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", key.namespace, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range list.Items {
		for uid, c := range t.byTarget[key.name] {
			if t.inForce(uid) && (only == nil || slices.Contains(only, uid)) && c.selection.SelectsByRule(key.namespace, list.Items[i].Labels, list.Items[i].Annotations) {
				return errBehind
			}
		}
	}
	return nil
}

// know records what a write returned, so that nothing waits for the watch to tell.
func (t *term) know(key targetKey, m *metav1.PartialObjectMetadata) {
	t.mu.Lock()
	mirror := t.targets[key.name]
	t.mu.Unlock()
	mirror.Put(types.NamespacedName{Namespace: key.namespace, Name: key.name}, impsync.ExistingOf(m))
}

func (t *term) forget(key targetKey, existing impsync.Existing) {
	t.mu.Lock()
	mirror := t.targets[key.name]
	t.mu.Unlock()
	mirror.Drop(types.NamespacedName{Namespace: key.namespace, Name: key.name},
		func(x impsync.Existing) bool {
			return x.UID == existing.UID && x.ResourceVersion == existing.ResourceVersion
		})
}

// reread looks at the Secret, the Lease and the rendered Secret themselves: a conflict may
// mean that another coordinator leads by now.
func (t *term) reread(ctx context.Context, key targetKey, d decision) error {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	m, err := t.secrets.Get(ctx, key.namespace, key.name)
	switch {
	case apierrors.IsNotFound(err):
		t.forget(key, d.existing)
	case err != nil:
		return err
	default:
		t.know(key, m)
	}
	if d.verb == create || d.verb == adopt {
		return nil
	}
	_, err, _ = t.reads.Do("lease", func() (any, error) { return nil, t.holdsLease(context.WithoutCancel(ctx)) })
	if err != nil || d.winner == nil {
		return err
	}
	uid := d.winner.ref.UID
	_, err, _ = t.reads.Do("rendered/"+string(uid), func() (any, error) { return nil, t.rereadRendered(context.WithoutCancel(ctx), uid) })
	return err
}

// rereadRendered records the rendered Secret as it is now.
func (t *term) rereadRendered(ctx context.Context, uid types.UID) error {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	name := impsync.RenderedName(uid)
	secret, err := t.core.Secrets(t.config.RenderedNamespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err): // the watch tells, if it has not yet
	case err != nil:
		return passing("read the rendered Secret", err)
	default:
		key := t.renderedKey(uid)
		read := t.renderedOf(secret)
		if was, ok := t.rendered.Get(key); !ok || impsync.Newer(read.resourceVersion, was.resourceVersion) {
			t.rendered.Put(key, read)
			t.resourceQueue.Add(uid)
		}
	}
	return nil
}

// confirmAlive asks for a resource, and returns a NotFound where it is gone or going.
func (t *term) confirmAlive(ctx context.Context, ref impsync.ResourceRef) error {
	_, err, _ := t.reads.Do("owner/"+string(ref.UID), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), impsync.CallTimeout)
		defer cancel()
		r := &v1alpha1.ImagePullSecret{}
		if err := t.images.Get().Resource(v1alpha1.Resource.Resource).Name(ref.Name).Do(ctx).Into(r); err != nil {
			return nil, fmt.Errorf("read ImagePullSecret %s: %w", ref.Name, err)
		}
		if r.UID != ref.UID || r.DeletionTimestamp != nil {
			return nil, apierrors.NewNotFound(v1alpha1.Resource.GroupResource(), ref.Name)
		}
		return nil, nil
	})
	return err
}

// conclude notes why something was not done.
func (t *term) conclude(key targetKey, d decision, err error) {
	class := impsync.ClassifyError(err)
	if class == impsync.ClassGone || errors.Is(err, errBehind) || errors.Is(err, errSuperseded) || errors.Is(err, errLeaseStale) {
		return // an event or another try settles it; without the Lease nothing is to be told
	}
	message := impsync.Explain(err)
	if class == impsync.ClassRetry {
		message = "will be tried again: " + message
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := d.winner
	switch {
	case c == nil:
	case d.verb == remove:
		t.undeletable[key] = undeletable{owner: c.ref.UID, message: message}
		t.statusDirty(c.ref.UID)
	case t.byTarget[key.name][c.ref.UID] != c: // it has another target by now, or none
	case apierrors.IsTooManyRequests(err): // that is no failure yet
		t.note(c, key.namespace, &outcome{kind: pending, counter: c.outcomes[key.namespace].counter, message: message})
	default:
		t.note(c, key.namespace, &outcome{kind: failed, counter: c.outcomes[key.namespace].counter, message: message})
	}
}
