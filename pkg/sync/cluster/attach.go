package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// account is what is kept of a ServiceAccount.
type account struct {
	uid             types.UID
	resourceVersion string
	labels          map[string]string
	// pullSecrets are the names in imagePullSecrets, and attached those of them that imps has put there, as far as the
	// annotation says.
	pullSecrets, attached []string
	deleting              bool
}

func accountOf(a *corev1.ServiceAccount) account {
	kept := account{
		uid: a.UID, resourceVersion: a.ResourceVersion, labels: a.Labels,
		attached: impsync.Attached(a), deleting: a.DeletionTimestamp != nil,
	}
	for _, ref := range a.ImagePullSecrets {
		kept.pullSecrets = append(kept.pullSecrets, ref.Name)
	}
	return kept
}

// attach returns what a ServiceAccount names, and what of that imps remembers to have put there, where it is to name some
// Secrets: what is missing is added at the end, what imps has added and is not wanted any more is taken out, and all else
// stays as it is, in its order. A name that was there already is somebody else's, and is not remembered. What is kept is
// neither added nor taken out.
func attach(pullSecrets, attached, wanted []string, kept func(name string) bool) (names, remembered []string) {
	names = slices.Clone(pullSecrets)
	for _, name := range attached {
		switch i := lastIndex(names, name); {
		case slices.Contains(wanted, name) || kept(name):
			remembered = append(remembered, name)
		case i >= 0:
			names = slices.Delete(names, i, i+1)
		}
	}
	for _, name := range slices.Sorted(slices.Values(wanted)) {
		if slices.Contains(names, name) {
			continue
		}
		names = append(names, name)
		if !slices.Contains(remembered, name) {
			remembered = append(remembered, name)
		}
	}
	return names, slices.DeleteFunc(remembered, func(name string) bool { return !slices.Contains(names, name) })
}

// lastIndex is where imps's own entry is, if a user has one of the same name: it was added at the end.
func lastIndex(names []string, name string) int {
	for i, n := range slices.Backward(names) {
		if n == name {
			return i
		}
	}
	return -1
}

// watchAccounts starts the watch of all ServiceAccounts, on first use. The caller holds the lock.
func (t *term) watchAccounts() {
	if t.accounts != nil {
		return
	}
	all := t.core.ServiceAccounts("")
	t.accounts = impsync.NewMirror(impsync.MirrorConfig[account]{
		Name: "ServiceAccounts", Example: &corev1.ServiceAccount{}, Log: t.log,
		ListWatch: impsync.TypedListWatch(all.List, all.Watch, metav1.ListOptions{}),
		Convert:   func(o runtime.Object) account { return accountOf(o.(*corev1.ServiceAccount)) },
		OnChange:  t.accountChanged,
		OnError:   func(error) { t.change(t.accountsDirty) },
		Version:   func(a account) string { return a.resourceVersion },
	})
	mirror := t.accounts
	t.background(mirror.Run)
	t.background(func(ctx context.Context) {
		select {
		case <-mirror.Synced():
			t.change(t.accountsDirty)
		case <-ctx.Done():
		}
	})
}

// accountsDirty has the status of all resources written that attach. The caller holds the lock.
func (t *term) accountsDirty() {
	for uid, c := range t.claims {
		if c.accounts != nil {
			t.statusDirty(uid)
		}
	}
}

// findAttached has ServiceAccounts watched also where no resource attaches anything any more, but one did so under an earlier
// leader.
func (t *term) findAttached(ctx context.Context) {
	for ctx.Err() == nil {
		t.mu.Lock()
		watched := t.accounts != nil
		t.mu.Unlock()
		if watched {
			return
		}
		asking, cancel := context.WithTimeout(ctx, 6*impsync.CallTimeout)
		// From the API server's memory: what that does not know of yet is of a leader that is at work.
		list, err := t.metadata.Resource(impsync.ServiceAccountResource).List(asking, metav1.ListOptions{ResourceVersion: "0"})
		cancel()
		if apierrors.IsForbidden(err) {
			return // nor may it change them
		}
		if err != nil {
			t.log.Debug("cannot look for ServiceAccounts that name a Secret of imps, will try again", "error", impsync.Explain(err))
			impsync.Pause(ctx, impsync.RecheckInterval)
			continue
		}
		if slices.ContainsFunc(list.Items, func(m metav1.PartialObjectMetadata) bool { return m.Annotations[impsync.AnnotationAttached] != "" }) {
			t.change(t.watchAccounts)
		}
		return
	}
}

// accountChanged is told of every event of a ServiceAccount.
func (t *term) accountChanged(key types.NamespacedName, old, current *account) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case current == nil:
		t.forgetAccount(key)
		t.accountsDirty()
		return
	case old == nil || old.uid != current.uid:
		t.forgetAccount(key)
		if t.accountsIn[key.Namespace] == nil {
			t.accountsIn[key.Namespace] = map[string]struct{}{}
		}
		t.accountsIn[key.Namespace][key.Name] = struct{}{}
	case old.resourceVersion == current.resourceVersion:
		return // our own write, which is known
	case t.writing[key]: // it is our own write, most likely
	case current.undoes(*old):
		t.noteUndone(key)
	}
	t.enqueueAccounts(key.Namespace)
}

// undoes reports whether somebody has taken an entry of ours out, or has put one in in our name.
func (a account) undoes(old account) bool {
	return slices.ContainsFunc(old.attached, func(name string) bool {
		return slices.Contains(old.pullSecrets, name) && !slices.Contains(a.pullSecrets, name)
	}) ||
		slices.ContainsFunc(a.attached, func(name string) bool { return !slices.Contains(old.attached, name) })
}

// noteUndone counts that somebody has undone what imps did to a ServiceAccount. The caller holds the lock.
func (t *term) noteUndone(key types.NamespacedName) {
	u := t.undone[key]
	if time.Since(u.last) > 2*repairMaxDelay {
		u = repairs{}
	}
	u.times++
	u.last = time.Now()
	t.undone[key] = u
}

// forgetAccount forgets a ServiceAccount that is gone. The caller holds the lock.
func (t *term) forgetAccount(key types.NamespacedName) {
	delete(t.accountsIn[key.Namespace], key.Name)
	if len(t.accountsIn[key.Namespace]) == 0 {
		delete(t.accountsIn, key.Namespace)
	}
	delete(t.undone, key)
	delete(t.refused, key)
}

// enqueueAccounts has the ServiceAccounts of a namespace looked at. The caller holds the lock.
func (t *term) enqueueAccounts(namespace string) {
	if len(t.accountsIn[namespace]) > 0 {
		t.accountQueue.Add(namespace)
	}
}

// enqueueAllAccounts has all of them looked at, as what some resource attaches has changed. The caller holds the lock.
func (t *term) enqueueAllAccounts() {
	for namespace := range t.accountsIn {
		t.accountQueue.Add(namespace)
	}
}

// setAccounts has a claim attach from now on what its resource says. The caller holds the lock.
func (t *term) setAccounts(c *claim, r *v1alpha1.ImagePullSecret) {
	spec := r.Spec.Target.ServiceAccounts
	if equality.Semantic.DeepEqual(c.accountsSpec, spec) {
		return
	}
	c.accountsSpec = spec.DeepCopy()
	c.accounts, c.accountsSkipped = impsync.CompileAccounts(spec)
	if c.accounts != nil {
		t.watchAccounts()
	}
	t.enqueueAllAccounts()
}

// attaches returns the name of the Secret that a claim has ServiceAccounts of a namespace name, empty where it does not. It
// does so before there are any credentials. The caller holds the lock.
func (t *term) attaches(c *claim, namespace string, meta namespaceMeta) string {
	if c.accounts == nil || !t.inForce(c.ref.UID) {
		return ""
	}
	name, selection := c.rendered.Target.Name(), c.selection
	if c.early != nil {
		name, selection = t.byUID[c.ref.UID].Spec.Target.Secret.Name, c.early
	}
	if !t.wants(c.ref.UID, selection, namespace, meta) {
		return ""
	}
	return name
}

// wants reports whether a selection of a resource selects a namespace. The caller holds the lock.
func (t *term) wants(uid types.UID, selection *impsync.Selection, namespace string, meta namespaceMeta) bool {
	if selection == nil || t.config.Excluded.Matches(namespace) {
		return false
	}
	state := t.demand.states[demandKey{namespace, uid}]
	return selection.SelectsByRule(namespace, meta.labels, meta.annotations) || selection.HasPodRules() && state != nil && state.nodes > 0
}

// attachment is what is to be changed of one ServiceAccount.
type attachment struct {
	was               account
	names, remembered []string
	// unselected are Secrets that it names no more because nothing selects the namespace for them any more.
	unselected []string
}

// judgeAccount returns what is to be changed of a ServiceAccount, nil for nothing.
func (t *term) judgeAccount(key types.NamespacedName, now time.Time) *attachment {
	t.mu.Lock()
	defer t.mu.Unlock()
	meta, there := t.namespaces.Get(types.NamespacedName{Name: key.Namespace})
	if !there || meta.terminating {
		return nil
	}
	a, there := t.accounts.Get(key)
	if !there || a.deleting {
		return nil
	}
	var wanted []string
	for _, c := range t.claims {
		if secret := t.attaches(c, key.Namespace, meta); secret != "" && c.accounts.Matches(key.Name, a.labels) && !slices.Contains(wanted, secret) {
			wanted = append(wanted, secret)
		}
	}
	change := &attachment{was: a}
	change.names, change.remembered = attach(a.pullSecrets, a.attached, wanted, func(secret string) bool {
		keeps, selected := t.keepsAttached(targetKey{key.Namespace, secret}, meta)
		if !keeps && !selected {
			change.unselected = append(change.unselected, secret)
		}
		return keeps
	})
	if slices.Equal(change.names, a.pullSecrets) && slices.Equal(change.remembered, a.attached) {
		return nil
	}
	if wait := t.undone[key].wait(now); wait > 0 {
		t.accountQueue.AddAfter(key.Namespace, wait)
		return nil
	}
	return change
}

// keepsAttached reports whether an entry stays that imps has added and no resource wants: what some resource wants is not
// known yet, or the Secret is there though nothing selects the namespace, as it was orphaned, or is about to be pruned. The
// caller holds the lock.
func (t *term) keepsAttached(key targetKey, meta namespaceMeta) (keeps, selected bool) {
	if t.targetNameAllowed(key.name) != nil {
		return true, false // not ours: somebody has edited the annotation
	}
	if t.awaited(key, meta, "") {
		t.accountQueue.AddAfter(key.namespace, impsync.RecheckSoonest)
		return true, false
	}
	for uid, r := range t.byUID {
		c := t.claims[uid]
		if c == nil || !t.inForce(uid) || c.rendered.Target.Name() != key.name && r.Spec.Target.Secret.Name != key.name {
			continue
		}
		wants := t.wants(uid, c.selection, key.namespace, meta) || t.wants(uid, c.early, key.namespace, meta)
		if wants && t.unsettled(uid) {
			return true, false
		}
		selected = selected || wants
	}
	if mirror := t.targets[key.name]; !selected && mirror != nil {
		if !isClosed(mirror.Synced()) {
			return true, false // looked at again once it is
		}
		existing, exists := mirror.Get(types.NamespacedName{Namespace: key.namespace, Name: key.name})
		keeps = exists && existing.Ownership != impsync.Foreign && existing.Ownership != impsync.Restored
	}
	return keeps, selected
}

// reconcileAccounts has the ServiceAccounts of a namespace name what they should.
func (t *term) reconcileAccounts(ctx context.Context, namespace string) error {
	t.mu.Lock()
	names := slices.Collect(maps.Keys(t.accountsIn[namespace]))
	t.mu.Unlock()
	failed := map[types.NamespacedName]error{}
	unwanted := map[string]bool{}
	for _, name := range names {
		key := types.NamespacedName{Namespace: namespace, Name: name}
		if err := t.reconcileAccount(ctx, key, unwanted); err != nil {
			failed[key] = err
		}
	}
	t.noteAccounts(namespace, failed)
	return errors.Join(slices.Collect(maps.Values(failed))...)
}

// reconcileAccount has a ServiceAccount name what it should. It notes the Secrets that are known to be unwanted in the
// namespace, so that this is asked for once.
func (t *term) reconcileAccount(ctx context.Context, key types.NamespacedName, unwanted map[string]bool) error {
	for range 5 {
		change := t.judgeAccount(key, time.Now())
		if change == nil {
			return nil
		}
		for _, secret := range change.unselected {
			if unwanted[secret] {
				continue
			}
			if err := t.confirmDetached(ctx, targetKey{key.Namespace, secret}); err != nil {
				return err
			}
			unwanted[secret] = true
		}
		if err := t.changeAccount(ctx, key, change); err != nil {
			return err
		}
	}
	return fmt.Errorf("ServiceAccount %s: %w", key, errAgain) // somebody writes as often as we do
}

// confirmDetached returns errBehind where a resource that lives may want an entry after all, of whom no watch has told yet.
func (t *term) confirmDetached(ctx context.Context, key targetKey) error {
	t.mu.Lock()
	byMetadata, byPods := t.rules(key)
	none := len(t.byTarget[key.name]) == 0
	t.mu.Unlock()
	if none {
		return nil // as of a Secret whose resource is gone
	}
	return t.confirmUnwanted(ctx, key, byMetadata, byPods, nil)
}

// changeAccount writes a change over the ServiceAccount that it was judged by. Where that is another by now, the new one is
// put in its place, to be judged anew, and there is no error.
func (t *term) changeAccount(ctx context.Context, key types.NamespacedName, change *attachment) error {
	patch, err := change.patch()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	t.change(func() { t.writing[key] = true })
	defer t.change(func() { delete(t.writing, key) })
	accounts := t.core.ServiceAccounts(key.Namespace)
	written, err := accounts.Patch(ctx, key.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: impsync.FieldManager})
	t.metrics.attachments.WithLabelValues(impsync.ResultOf(err)).Inc()
	conflict := apierrors.IsConflict(err)
	if conflict {
		written, err = accounts.Get(ctx, key.Name, metav1.GetOptions{})
	}
	switch {
	case apierrors.IsNotFound(err):
		t.accounts.Drop(key, func(a account) bool { return a.uid == change.was.uid })
		t.change(func() {
			if _, there := t.accounts.Get(key); !there { // else another one has come
				t.forgetAccount(key)
			}
		})
		return nil
	case err != nil:
		return fmt.Errorf("ServiceAccount %s: %w", key, err)
	}
	is := accountOf(written)
	t.accounts.Put(key, is)
	if !conflict && !slices.Equal(is.pullSecrets, change.names) {
		t.change(func() { t.noteUndone(key) }) // a webhook has changed what was written
	}
	return nil
}

// patch is a JSON merge patch. imagePullSecrets is an atomic list, which it replaces: so it is a conflict where anything has
// changed.
func (c *attachment) patch() ([]byte, error) {
	refs := []corev1.LocalObjectReference{}
	for _, name := range c.names {
		refs = append(refs, corev1.LocalObjectReference{Name: name})
	}
	annotations := map[string]any{impsync.AnnotationAttached: nil, impsync.AnnotationAttachedAt: nil} // null takes one off
	if len(c.remembered) > 0 {
		annotations = map[string]any{impsync.AnnotationAttached: strings.Join(c.remembered, ",")}
		if slices.ContainsFunc(c.names, func(name string) bool { return !slices.Contains(c.was.pullSecrets, name) }) {
			annotations[impsync.AnnotationAttachedAt] = time.Now().UTC().Format(time.RFC3339)
		}
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{
			"uid": c.was.uid, "resourceVersion": c.was.resourceVersion, "annotations": annotations,
		},
		"imagePullSecrets": refs,
	})
}

// noteAccounts notes why ServiceAccounts of a namespace could not be changed, and has the status of those told who want it.
func (t *term) noteAccounts(namespace string, failed map[types.NamespacedName]error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name := range t.accountsIn[namespace] {
		key := types.NamespacedName{Namespace: namespace, Name: name}
		delete(t.refused, key)
		passes := []error{errBehind, errLeaseStale, errAgain}
		err := failed[key]
		if err != nil && !apierrors.IsTooManyRequests(err) && !slices.ContainsFunc(passes, func(p error) bool { return errors.Is(err, p) }) {
			t.refused[key] = impsync.Explain(err)
		}
	}
	t.accountsDirty()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// accountsReady is the condition about the ServiceAccounts of a resource and the Pods that came before them, empty where it
// asks for neither. The caller holds the lock.
func (t *term) accountsReady(r *v1alpha1.ImagePullSecret, c *claim) (condition metav1.Condition) {
	if c.accounts != nil {
		condition = t.accountsNamed(c)
	}
	if refused := t.rescueRefused(r.Spec.Target.Rescue); refused != "" && condition.Status != metav1.ConditionFalse {
		condition.Type, condition.Status, condition.Reason = v1alpha1.ConditionServiceAccountsReady, metav1.ConditionFalse, reasonNotAllowed
		condition.Message = strings.TrimSuffix(refused+"; "+condition.Message, "; ")
	}
	return condition
}

// accountsNamed is the condition about the ServiceAccounts of a claim. The caller holds the lock.
func (t *term) accountsNamed(c *claim) metav1.Condition {
	condition := metav1.Condition{Type: v1alpha1.ConditionServiceAccountsReady, Status: metav1.ConditionFalse, Reason: reasonFailed}
	err, read := t.accounts.Err(), isClosed(t.accounts.Synced())
	switch {
	case apierrors.IsForbidden(err):
		condition.Message = "the ServiceAccounts cannot be read: " + impsync.Explain(err) + "; the chart's value attachServiceAccounts gives the right"
		return condition
	case !read && err != nil:
		condition.Message = "the ServiceAccounts cannot be read: " + impsync.Explain(err)
		return condition
	case !read:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionUnknown, reasonProgressing, "the ServiceAccounts have not been read yet"
		return condition
	}
	wanted, named := 0, 0
	var failed []string
	for namespace, names := range t.accountsIn {
		meta, there := t.namespaces.Get(types.NamespacedName{Name: namespace})
		secret := t.attaches(c, namespace, meta)
		if !there || meta.terminating || secret == "" {
			continue
		}
		for name := range names {
			key := types.NamespacedName{Namespace: namespace, Name: name}
			a, ok := t.accounts.Get(key)
			if !ok || a.deleting || !c.accounts.Matches(name, a.labels) {
				continue
			}
			wanted++
			switch {
			case slices.Contains(a.pullSecrets, secret):
				named++
			case t.refused[key] != "":
				failed = append(failed, key.String()+": "+t.refused[key])
			case t.undone[key].times >= promptRepairs:
				failed = append(failed, key.String()+": somebody takes the entry out whenever it is put in; it is put in ever more seldom, every 5 minutes in the end (docs/serviceaccounts.md says how to have GitOps tools leave it)")
			}
		}
	}
	slices.Sort(failed)
	progress := fmt.Sprintf("%d of %d ServiceAccounts name the Secret", named, wanted)
	switch {
	case len(c.accountsSkipped) > 0:
		condition.Reason, condition.Message = reasonInvalid, errors.Join(c.accountsSkipped...).Error()+"; this selector is left out, the others are served"
	case len(failed) > 0:
		condition.Message = progress + notOf + listed(failed)
	case named < wanted:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionUnknown, reasonProgressing, progress
	default:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionTrue, reasonReady, progress
	}
	return condition
}
